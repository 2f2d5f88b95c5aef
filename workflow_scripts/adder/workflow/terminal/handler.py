"""Snakemake's logger plugin "adder": one line a stage with what came out of it, a live line below, the verdict last.

Snakemake's records come in one thread, the live line is drawn by another; what both use is under the screen's lock.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import INFO, WARNING, LogRecord
from pathlib import Path
from types import FrameType
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase

from adder.core.display.status import SHOWN_BY_PLUGIN
from adder.core.display.text import one_line
from adder.workflow.terminal import job_stderr, plan
from adder.workflow.terminal.screen import Screen
from adder.workflow.terminal.snakemake_text import configuration_mistake
from adder.workflow.terminal.story import Story

# What Snakemake says at every start.
NOISE = ("Assuming unrestricted shared filesystem", "Building DAG of jobs", "host: ")
REFRESH = 0.5  # seconds
AGAIN = "the same command goes on from here"


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    """The plugin's flags."""

    plain: bool = field(default=False, metadata={"help": "Show Snakemake's own output instead.", "required": False})


class LogHandler(LogHandlerBase):
    """What Snakemake makes of the plugin. Where Snakemake is to speak for itself it does nothing."""

    def __post_init__(self) -> None:
        """Take the terminal, unless Snakemake's own output is asked for."""
        wanted = self.common_settings
        asked = isinstance(self.settings, LogHandlerSettings) and self.settings.plain
        self.plain = asked or any((wanted.verbose, wanted.debug_dag, wanted.printshellcmds))
        self.over = threading.Event()
        self.drawing: threading.Thread | None = None
        self.executes = False
        if self.plain:
            return
        os.environ[SHOWN_BY_PLUGIN] = "1"
        quiet = {str(getattr(one, "name", one)).lower() for one in wanted.quiet or ()}
        screen = Screen(sys.stdout if wanted.stdout else sys.stderr, colour=not wanted.nocolor)
        stages = not quiet & {"all", "rules", "progress"}
        self.story = Story(screen, stages, closing="all" not in quiet, is_plan=wanted.dryrun)
        self.at_end = contextlib.ExitStack()
        plan.call_at_begin(self._keep_jobs_off)
        self.heard: dict[LogEvent | None, Callable[[Any], None]] = {
            LogEvent.JOB_INFO: self._job_begins,
            LogEvent.JOB_FINISHED: lambda record: self.story.job_done(record.job_id),
            LogEvent.JOB_ERROR: lambda record: self.story.job_failed(record.jobid, str(record.rule_msg or "")),
            LogEvent.ERROR: lambda record: self._error(record.getMessage()),
            LogEvent.WORKFLOW_STARTED: self._run_begins,
            None: self._message,
        }
        if threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._interrupted)

    @property
    def writes_to_stream(self) -> bool:
        """Whether Snakemake leaves the terminal alone."""
        return not self.plain

    @property
    def writes_to_file(self) -> bool:
        """No; Snakemake has its own log."""
        return False

    @property
    def has_filter(self) -> bool:
        """Everything is heard: what isn't shown counts too."""
        return True

    @property
    def has_formatter(self) -> bool:
        """Records are no lines here."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """The stages tell what they read."""
        return False

    def emit(self, record: LogRecord) -> None:
        """Take notice of what Snakemake says."""
        if self.plain:
            return
        try:
            heard = self.heard.get(getattr(record, "event", None))
            if heard is not None:
                heard(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Say how it ended; called once, when Snakemake is through."""
        if not self.plain and not self.over.is_set():
            self.over.set()
            if self.drawing is not None:
                self.drawing.join()
            plan.call_at_begin(None)
            self.story.close()
            self.at_end.close()
            os.environ.pop(SHOWN_BY_PLUGIN, None)
        super().close()

    def _keep_jobs_off(self, known: plan.Plan) -> None:
        log = known.results / "logs" / "jobs.stderr.log"
        terminal = self.at_end.enter_context(job_stderr.kept_in(log))
        with self.story.screen.lock:
            self.story.jobs_wrote = log
            self.story.screen.stream = terminal

    def _job_begins(self, record: Any) -> None:
        output, log = list(record.output or ()), list(record.log or ())
        side_job = plan.side_job(record.rule_name, (record.wildcards or {}).get("run"))
        self.story.job_begins(
            record.jobid,
            side_job or one_line(str(record.rule_msg or record.rule_name)),
            output[0] if output else "",
            Path(log[0]) if log else None,
            str(record.reason or ""),
        )
        if self.drawing is None and self.story.screen.is_live:
            self.drawing = threading.Thread(target=self._draw, daemon=True)
            self.drawing.start()

    def _run_begins(self, record: LogRecord) -> None:
        self.executes = True

    def _error(self, text: str) -> None:
        unread = plan.current() is None and "load_configfile" in text
        self.story.error((configuration_mistake(sys.argv[1:]) if unread else None) or text)

    def _message(self, record: LogRecord) -> None:
        text = record.getMessage() if record.msg else ""
        if text.startswith("Nothing to be done"):
            self.story.nothing_to_do = True
        elif text.startswith("Terminating processes on user request") or text.startswith("Will exit after finishing"):
            self.story.stopped = True
        elif record.levelno == INFO and not self.executes and not text.startswith(NOISE):
            self.story.say(text)  # of what isn't a run, such as --lint, --report and --unlock
        elif record.levelno >= WARNING:
            self.story.warning(text) if record.levelno == WARNING else self.story.error(text)

    def _draw(self) -> None:
        while not self.over.wait(REFRESH):
            self.story.draw(time.time())

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """End Snakemake in an orderly way at the first Ctrl-C, and everything at the second."""
        if not self.story.stopped:
            self.story.stopped = True
            self.story.say("Stopping; a second Ctrl-C doesn't wait for what is running.")
            raise SystemExit(128 + number)
        self.over.set()
        import psutil  # not at the top: it is needed here alone

        for process in psutil.Process().children(recursive=True):
            process.kill()
        self.story.screen.live("")
        self.story.screen.line(f"Stopped at once; {AGAIN}.")
        os._exit(128 + number)
