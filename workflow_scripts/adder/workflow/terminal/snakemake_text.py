"""What Snakemake says of errors, brought down to what people can use."""

import re

# Said when a job has failed, of which more is known by then.
OF_FAILED_JOBS = re.compile(
    r"^Exiting because a job execution failed|At least one job did not complete successfully"
    r"|^(CalledProcessError|RuleException|SpawnedJobError)\b"
)
HEAD = re.compile(r"^(\w*(?:Error|Exception))(?: in (?:rule \w+ in )?file .*?, line \d+)?:?$")
FRAME = re.compile(r'^\s*(File ".*", line \d+, in |Traceback|Full Traceback)')
KILLED = re.compile(r"died with <Signals\.(SIG\w+)")


def sentence(text: str) -> str:
    """An error's text without the exception's name, where there is more, and without the lines of a traceback."""
    lines = [line.rstrip() for line in text.strip().splitlines() if line.strip() and not FRAME.match(line)]
    if len(lines) > 1 and HEAD.match(lines[0]):
        lines = lines[1:]
    return "\n".join(lines)


def is_of_failed_job(text: str) -> bool:
    """Whether this only says that some job has failed."""
    return bool(OF_FAILED_JOBS.search(text.strip()))


def killed_by(text: str) -> str | None:
    """The signal, such as SIGKILL, that a failed job's process died of."""
    found = KILLED.search(text)
    return found[1] if found else None
