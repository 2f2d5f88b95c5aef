"""What Adder chose: the candidates' columns in the order in which they are read, the chosen one marked."""

from adder.report.facts import load
from adder.report.page_section import RunReport
from adder.report.run_metrics import build_metrics
from adder.report.sections import choices_section
from report_fixture import write_stage_folders


def test_columns_stand_in_the_order_in_which_people_read_them():
    rows = [{"packs": 8, "extra": 1, "max_seq_length": 128}, {"packs": 4, "max_seq_length": 256}]
    table = choices_section.table(rows, "max_seq_length", 256)
    assert table is not None and table.columns == ["length", "packs", "extra"]
    assert [row.chosen for row in table.rows] == [False, True]
    assert table.rows[1].cells == [("max_seq_length", 256), ("packs", 4), ("extra", None)]
    assert choices_section.table([]) is None


def test_a_choice_that_has_a_section_of_its_own_leaves_its_table_there(tmp_path):
    settings, inputs = write_stage_folders(tmp_path, heldout=5)
    facts = load(inputs, settings.shows)
    view = choices_section.view(RunReport(settings, facts, build_metrics(settings, facts)))
    choices = {choice.key: choice for choice in view["choices"]}
    assert choices["lengths.max_seq_length"].table is None
    micro = choices["train.micro_batch_size"].table
    assert micro is not None and micro.columns == ["micro-batch", "fits", "tokens per second"]
