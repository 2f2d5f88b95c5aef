"""What stands last: verdicts and paths of the runs that have any."""

import pytest

from adder.core.files import write_json
from adder.workflow.terminal import closing


def finish(folder, name, word="better", **more):
    (folder / name).mkdir(parents=True)
    write_json(folder / name / "metrics.json", {"verdict": {"verdict": word, "sentence": f"It is {word}.", **more}})
    (folder / name / "report.html").write_text("a report")


def test_one_run_has_its_sentence_and_its_paths(tmp_path):
    finish(tmp_path, "default")
    (tmp_path / "default" / "merged_model").mkdir()
    (tmp_path / "default" / "merged_model" / "config.json").write_text("{}")
    (tmp_path / "default" / "model.gguf").write_text("")
    lines = list(closing.closing_lines(["default"], tmp_path))
    assert lines[0] == ("", "It is better.")
    assert [line.head for line in lines[1:]] == ["report", "model", "talk to it", "GGUF"]
    assert lines[1].text == str(tmp_path / "default" / "report.html")


def test_of_several_runs_each_has_a_line_and_the_comparison_the_last(tmp_path):
    finish(tmp_path, "a")
    finish(tmp_path, "b", "can't tell", doubts=["20 of 20 tuned replies are cut off"])
    lines = list(closing.closing_lines(["a", "b", "not there"], tmp_path))
    assert [line.head for line in lines] == ["a", "b", "all runs"]
    assert lines[1].text.startswith("can't tell: ") and "snakemake --cores 1 compare" in lines[2].text
    assert lines[0].text.startswith("better: ")
    finish(tmp_path, "c", doubts=["the doctor warns of overfitting"])
    assert list(closing.closing_lines(["a", "c"], tmp_path))[1].text.startswith("better, to be read with care: ")
    (tmp_path / "compare.html").write_text("")
    assert list(closing.closing_lines(["a", "b"], tmp_path))[-1].text == str(tmp_path / "compare.html")


def test_what_is_suggested_can_be_typed_as_it_stands(tmp_path, monkeypatch):
    """By the path in an environment that isn't activated, and with the configuration that the runs are of."""
    for name in ("adder", "snakemake"):
        (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv" / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(closing.sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(
        closing.sys, "argv", ["snakemake", "--cores", "1", "merged_model", "--configfile", "my own.yaml"]
    )
    monkeypatch.setenv("PATH", "/nowhere")
    finish(tmp_path, "a")
    finish(tmp_path, "b")
    wanted = "on one page: .venv/bin/snakemake --cores 1 compare --configfile 'my own.yaml'"
    assert list(closing.closing_lines(["a", "b"], tmp_path))[-1].text == wanted
    monkeypatch.setenv("PATH", str(tmp_path / ".venv" / "bin"))
    assert closing.command("adder") == "adder"


def test_a_large_sweep_stays_on_the_screen(tmp_path):
    names = [f"run-{number}" for number in range(50)]
    for name in names:
        finish(tmp_path, name)
    lines = list(closing.closing_lines(names, tmp_path))
    assert len(lines) <= 12 and any("42 more runs" in line.text for line in lines)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"verdict": 1}'])
def test_a_damaged_page_is_no_run_and_ends_nothing(tmp_path, content):
    finish(tmp_path, "default")
    (tmp_path / "default" / "metrics.json").write_text(content)
    assert list(closing.closing_lines(["default"], tmp_path)) == []


def test_they_are_printed_where_snakemake_has_the_terminal(tmp_path, monkeypatch, capsys):
    finish(tmp_path, "default", "better\x1b[2J")
    monkeypatch.setenv("ADDER_TERMINAL", "1")
    closing.show(["default"], tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("ADDER_TERMINAL")
    closing.show(["default"], tmp_path)
    assert capsys.readouterr().err.startswith("It is better\\x1b[2J.\nreport: ")
