"""What the terminal shows of a run, by the plugin that the default profile sets."""

import json
import os
import sys

from project import Project
from terminal import Terminal

STORY = ("format", "tokenize", "lengths", "isolation", "train", "merge", "evaluate base", "evaluate tuned", "report")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]


def in_terminal(project: Project, *arguments: str, columns: int = 100) -> Terminal:
    return Terminal(command(*arguments), project.folder, project.environment, columns)


def test_a_whole_run_fits_on_a_screen_with_verdict_and_paths_last(project):
    project.configure()
    terminal = in_terminal(project, "merged_model", "--forceall")  # each stage is restored
    assert terminal.run() == 0, terminal.raw
    lines = [line for line in terminal.screen() if line]
    told = "\n".join(lines)
    # What a tiny model of random weights is warned of isn't the story; it takes ten lines and more.
    assert len([line for line in lines if line.startswith("  ✓") or not line.startswith("  ")]) <= 20
    assert all(any(line.startswith(f"  ✓ {name} ") for line in lines) for name in STORY)
    assert all(name in told for name in ("restored: ", "report", "model"))
    sentence = project.result("metrics.json")["verdict"]["sentence"]
    assert sentence[:30] in " ".join(told.split()) and any(
        line.split() == ["model", "results/default/merged_model/"] for line in lines[-4:]
    )
    assert "\r\033[K" in terminal.raw and "\033[" not in told


def test_a_file_gets_the_same_lines_without_the_live_one(project):
    project.configure({"report": {"title": "Another"}})
    done = project.python(*command("merged_model")[1:])
    assert done.returncode == 0 and "\033" not in done.stdout and "\r" not in done.stdout
    assert "  ✓ report " in done.stdout and "the verdict: " in done.stdout
    assert ["report", "results/default/report.html"] in [line.split() for line in done.stdout.splitlines()[-5:]]


def test_nothing_to_do_says_where_everything_is(project):
    project.configure({"report": {"title": "Another"}})
    done = project.python(*command("merged_model")[1:])
    assert done.returncode == 0 and "Nothing to do" in done.stdout and "results/default/report.html" in done.stdout
    asked = project.python(*command("merged_model", "-n")[1:])
    assert "Nothing to be done" in asked.stdout


def test_snakemakes_own_output_is_one_flag_away(project):
    project.configure({"report": {"title": "A third"}})
    done = project.python(*command("merged_model", "--logger-adder-plain")[1:])
    assert done.returncode == 0 and "Job stats" in done.stdout and "report: done in" in done.stdout


def test_a_failed_stage_is_told_once(project):
    rows = project.folder / "rows.jsonl"
    good = rows.read_text()
    rows.write_text(good + json.dumps({"prompt": "no\x1b[2J\u202ereply"}) + "\n")
    try:
        project.configure({"format": {"max_rejected": 0}})
        terminal = in_terminal(project, "merged_model", columns=40)
        assert terminal.run() == 1
    finally:
        rows.write_text(good)
        os.utime(rows)
    lines = [line for line in terminal.screen() if line]
    told = " ".join(lines)
    assert told.count("✗") == 1 and "Traceback" not in told and "CalledProcessError" not in told
    assert "the same command goes on." in " ".join(lines[-3:])


def test_a_sweep_of_which_one_run_fails_is_compared_without_it(project):
    project.configure({"runs": {"default": {}, "short": {"lengths": {"max_seq_length": 16}}}})
    terminal = in_terminal(project, "compare", "-k")
    assert terminal.run() == 1
    told = " ".join(line.strip() for line in terminal.screen())
    reason = "lengths.max_seq_length: 16 drops every example"
    assert told.count("✗ lengths short") == 1 and reason in told and "results/compare.html" in told
    page = (project.folder / "results" / "compare.html").read_text()
    assert "<strong>short</strong>" in page and reason in page
    assert "compare_runs" in project.snakemake("-n", "compare", config={"runs": {"default": {}}})


def test_ctrl_c_twice_ends_it_in_a_sentence(project):
    project.configure({"train": {"seed": 7, "epochs": 100}})  # long enough to be stopped, on any machine
    terminal, pressed = in_terminal(project, "merged_model"), []

    def press(shown: Terminal) -> None:
        if len(pressed) < 2 and ("Stopping;" if pressed else "· train") in shown.raw:
            shown.press("\x03")
            pressed.append("Ctrl-C")

    assert terminal.run(press) != 0 and len(pressed) == 2, terminal.raw
    lines = [line for line in terminal.screen() if line]
    assert lines[-1].startswith("Stopped") and lines[-1].endswith("the same command goes on from here.")
    assert "Traceback" not in terminal.raw
