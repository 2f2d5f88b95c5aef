"""The plugin as Snakemake takes it: found by name, given the terminal unless its own output is asked for."""

import io
import logging
import signal
import sys

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry
from snakemake_interface_logger_plugins.tests import MockOutputSettings

from adder.core.display.status import StageStatus, status_file, write_status
from adder.workflow.terminal.handler import LogHandler, LogHandlerSettings


def record(event, message="", level=logging.INFO, **extra):
    made = logging.LogRecord("snakemake", level, "x.py", 1, message, (), None)
    made.__dict__.update(extra | ({"event": event} if event else {}))
    return made


@pytest.fixture
def made(monkeypatch):
    """A handler on what is no terminal, and what it has written so far."""
    written = io.StringIO()
    monkeypatch.delenv("ADDER_TERMINAL", raising=False)
    before = signal.getsignal(signal.SIGINT)

    def make(plain=False, **common):
        monkeypatch.setattr(sys, "stderr", written)
        settings = MockOutputSettings()
        settings.printshellcmds = False
        for name, value in common.items():
            setattr(settings, name, value)
        return LogHandler(settings, LogHandlerSettings(plain=plain)), written

    yield make
    signal.signal(signal.SIGINT, before)


def begin(handler, log=None, number=1, rule="other_rule", **extra):
    of_rule = {
        "rule_msg": "Aligning",
        "rule_name": rule,
        "wildcards": {},
        "output": ["x.txt"],
        "log": [],
        "reason": "Forced execution",
    }
    handler.emit(record(LogEvent.JOB_INFO, jobid=number, **of_rule | ({"log": [str(log)]} if log else {}) | extra))


def test_snakemake_finds_it_with_its_flag():
    plugin = LoggerPluginRegistry().get_plugin("adder")
    assert plugin.log_handler is LogHandler and plugin.get_cli_arg("plain") == "--logger-adder-plain"


@pytest.mark.parametrize("asked", [{"plain": True}, {"debug_dag": True}, {"verbose": True}, {"printshellcmds": True}])
def test_snakemakes_own_output_is_shown_where_it_is_asked_for(made, asked):
    handler, written = made(**asked)
    begin(handler)
    handler.close()
    assert not handler.writes_to_stream and written.getvalue() == ""


def test_jobs_of_any_workflow_have_a_line_each(made):
    handler, written = made()
    handler.emit(record(LogEvent.RUN_INFO, "Job stats: …"))
    begin(handler)
    handler.emit(record(LogEvent.JOB_FINISHED, job_id=1))
    handler.emit(record(LogEvent.JOB_FINISHED, job_id=7))
    handler.close()
    (line,) = written.getvalue().splitlines()
    assert line.split() == ["✓", "Aligning", "0", "s"]


def test_a_failure_is_told_once_by_the_jobs_own_sentence(made, tmp_path):
    handler, written = made()
    log = tmp_path / "x.log"
    write_status(status_file(log), StageStatus(error="of an earlier run"))
    begin(handler, log)
    write_status(
        status_file(log), StageStatus(error="rows.jsonl, row 3: \x1b[2J is no number", notices=["warning: old"])
    )
    handler.emit(record(LogEvent.ERROR, 'CalledProcessError in file "x", line 1:\nCommand', logging.ERROR))
    failed = record(LogEvent.JOB_ERROR, level=logging.ERROR, jobid=1, rule_msg=None)
    handler.emit(failed)
    handler.emit(failed)
    handler.emit(record(None, "Exiting because a job execution failed. Look above", logging.ERROR))
    handler.emit(
        record(LogEvent.ERROR, "WorkflowError:\nAt least one job did not complete successfully.", logging.ERROR)
    )
    handler.close()
    text = written.getvalue()
    assert text.count("row 3: \\x1b[2J is no number") == 1 and "\x1b" not in text and "earlier" not in text
    assert "Command" not in text and "Exiting" not in text and "  ! old" in text


def test_a_job_that_died_without_a_word_says_of_what_and_where_its_log_is(made, tmp_path):
    handler, written = made()
    begin(handler, tmp_path / "x.log")
    died = "CalledProcessError in file \"x\", line 1:\nCommand 'python' died with <Signals.SIGKILL: 9>."
    handler.emit(record(LogEvent.ERROR, died, logging.ERROR))
    handler.emit(record(LogEvent.JOB_ERROR, level=logging.ERROR, jobid=1, rule_msg=None))
    handler.close()
    assert "memory running out" in written.getvalue() and f"its log is {tmp_path / 'x.log'}" in written.getvalue()


def test_an_error_of_snakemakes_own_is_one_sentence(made):
    handler, written = made()
    text = 'WorkflowError in file "/a/x.smk", line 3:\npush: no run says where to\n  File "/a/x.smk", line 3, in f'
    handler.emit(record(LogEvent.ERROR, text, logging.ERROR))
    handler.close()
    assert written.getvalue() == "  ✗ push: no run says where to\n"


@pytest.mark.parametrize(("quiet", "lines"), [(set(), 1), ({"rules", "progress"}, 0), ({"all"}, 0)])
def test_quiet_leaves_the_lines_out(made, quiet, lines):
    handler, written = made(quiet=quiet)
    begin(handler)
    handler.emit(record(LogEvent.JOB_FINISHED, job_id=1))
    handler.close()
    assert len(written.getvalue().splitlines()) == lines


def test_the_first_interrupt_ends_snakemake_without_a_traceback(made):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handler, written = made()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)
    handler.close()
    assert written.getvalue().startswith("Stopping; ")


def test_a_dry_run_lists_what_would_run_and_why(made):
    handler, written = made(dryrun=True)
    handler.emit(record(LogEvent.WORKFLOW_STARTED, "Workflow has started!"))
    begin(handler)
    begin(handler)
    handler.emit(
        record(None, "This was a dry-run (flag -n). The order of jobs does not reflect the order of execution.")
    )
    handler.close()
    line, total = written.getvalue().splitlines()
    assert line.split(maxsplit=2) == ["·", "Aligning", "it is asked for anew"] and total.startswith("1 job would run")


def test_what_is_no_run_says_what_snakemake_says(made):
    handler, written = made()
    handler.emit(record(None, "Building DAG of jobs..."))
    handler.emit(record(None, "Unlocked working directory."))
    handler.emit(record(LogEvent.WORKFLOW_STARTED, "Workflow has started!"))
    handler.emit(record(None, "Using shell: /bin/bash"))
    handler.close()
    assert written.getvalue() == "Unlocked working directory.\n"
