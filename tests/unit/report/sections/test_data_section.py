"""The data section: every row accounted for, sources, findings, all of it text."""

from adder.report.facts import load
from adder.report.sections import data_section
from page_parser import Page
from report_fixture import write_stage_folders
from report_pages import make, page_of


def test_what_data_says_is_escaped_in_every_part_of_the_data_section(tmp_path):
    out = make(tmp_path, hostile=True, heldout=30)
    text = (out / "report.html").read_text(encoding="utf-8")
    data = text[text.index('<section id="data"') : text.index('<section id="lengths"')]
    shown = " ".join(Page(data).text)
    script = "<script>alert('adder')</script>"
    # Reason, its raw row, source name, path, licence, finding, column name and value, first word, message, reasoning,
    # tool name, plain text, token example's name and token, reason of the tokenizer.
    for before in (
        "no assistant turn", '{"message": "', "tickets", "train-00000-of-00001.parquet", "CC0-1.0", "my kettle",
        "language", "日本語", "<b>", "48213?", "due date is 3 May.", "track_order", "Four ticks: ````", "tickets:1",
        "refuses it", "the columns mood",
    ):  # fmt: skip
        assert before + script in shown, before
    assert "<script" not in data


def test_rows_are_accounted_for_and_empty_classes_are_not_shown(finished, tmp_path):
    words = page_of(finished).words
    for fate in ("Copies50", "Test sets40", "Near-duplicates9", "Left out210", "Not tokenized1", "Too long3"):
        assert fate in words
    assert "nothing reads the columns mood (980 rows)" in words
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    facts = load(inputs, settings.shows)
    card = facts.format
    for name in ("tests", "near_duplicates", "left_out", "repeats"):
        card["rows_in"] -= card[name] if name != "repeats" else 0
        card[name] = 0
    names = [name for name, _, _ in data_section.fates(facts)]
    assert not {"Copies", "Test sets", "Near-duplicates", "Left out"} & set(names)
    parts = data_section.flow_parts(card)
    assert sum(part.count for part in parts) == card["rows_in"]
    assert [part.name for part in parts] == ["training", "held out", "duplicates", "leaked", "rejected"]


def test_sources_say_where_they_came_from_and_what_pins_them(finished):
    words = page_of(finished).words
    assert "notes data/notes.jsonl jsonl latin-1 80 2 unreadable text training not stated sha256 99cc99cc99cc" in words
    assert "messages training weight 0.5 apache-2.0 commit 3f1c3f1" in words
    assert "test set MIT" in words


def test_findings_say_what_was_done(tmp_path):
    settings, inputs = write_stage_folders(tmp_path / "stages", heldout=5)
    card = load(inputs, settings.shows).format
    _, near, overlap = data_section.findings(card)
    assert near.summary == "9 rows found, 9 of them dropped." and "MinHash" in near.method
    assert near.pairs[0].left[:2] == ("dropped", "tickets:20") and near.pairs[0].right[0] == "kept"
    assert [pair.note for pair in overlap.pairs] == [
        "8-word overlap: 85\u00a0% of the held-out words", "same prompt"
    ]  # fmt: skip
    card["quality"]["near_duplicates"] |= {"action": "off", "found": 0, "dropped": 0, "examples": []}
    card["quality"]["overlap"] |= {"action": "report", "dropped": 1}
    _, near, overlap = data_section.findings(card)
    assert (near.summary, near.method) == ("Not looked for.", "")
    assert overlap.summary == "6 rows found, 1 of them dropped."
    assert [pair.left[0] for pair in overlap.pairs] == ["stays", "dropped"]


def test_columns_in_the_split_are_set_as_code(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "one conversation, by column <code>thread</code>, never stands" in text
    assert data_section.ticked("by `a` and `b`") == [(False, "by "), (True, "a"), (False, " and "), (True, "b")]


def test_many_turns_share_a_bar_and_the_widest_bar_is_the_largest_count():
    assert data_section.bars([("a", 50), (True, 200), ("", 1)]) == [
        data_section.Bar("a", 50, 25.0),
        data_section.Bar("true", 200, 100.0),
        data_section.Bar("(empty)", 1, 0.5),
    ]
    card = {"turns": {str(n): n for n in range(1, 21)}, "roles": {}, "first_words": {"prompt": [], "reply": []}}
    (chart,) = data_section.counted(card | {"columns": {}})
    assert [bar.name for bar in chart.bars] == [*map(str, range(1, 9)), "9 or more"]
    assert sum(bar.count for bar in chart.bars) == sum(range(1, 21))
