"""What Snakemake says of errors, brought down to what people can use."""

import re
from collections.abc import Sequence
from pathlib import Path

from adder.core.errors import UserError, of_system
from adder.workflow import config_file

# Said when a job has failed, of which more is known by then.
OF_FAILED_JOBS = re.compile(
    r"^Exiting because a job execution failed|At least one job did not complete successfully"
    r"|^(CalledProcessError|RuleException|SpawnedJobError)\b"
)
HEAD = re.compile(r"^(\w*(?:Error|Exception|Exception in rule \w+))(?: in (?:rule \w+ in )?file .*?, line \d+)?:?$")
FRAME = re.compile(r'^\s*(File ".*", line \d+, in |Traceback|Full Traceback)')
OF_SYSTEM = re.compile(r"^(?:\w+Error: )?\[Errno (?P<number>\d+)\] (?P<reason>[^:]+)(?:: '(?P<file>.*)')?$")
KILLED = re.compile(r"died with <Signals\.(SIG\w+)")

# Why a job would run, by what Snakemake's reason begins with; what isn't here is shown in its words.
REASONS = {
    "Missing output files": "not made yet",
    "Incomplete output files": "was not finished",
    "Updated input files": "what it reads has changed",
    "Input files updated by another job": "what it reads is made anew",
    "Set of input files has changed since last execution": "it reads other files",
    "Code has changed since last execution": "its code has changed",
    "Params have changed since last execution": "its settings have changed",
    "Forced execution": "it is asked for anew",
}


def reason(text: str) -> str:
    """Why a job would run, without the files that Snakemake lists."""
    found = [part.partition(":")[0].strip() for part in text.split("; ")]
    said = [REASONS.get(head, head) for head in found if head]
    if "not made yet" in said:
        return "not made yet"
    return ", ".join(dict.fromkeys(said))


def sentence(text: str) -> str:
    """An error's text without the exception's name, where there is more, and without the lines of a traceback."""
    lines = [line.rstrip() for line in text.strip().splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback"):
        frames = [number for number, line in enumerate(lines) if line.startswith(" ") or line.startswith("Traceback")]
        lines = lines[frames[-1] + 1 :] or lines[-1:]
    lines = [line for line in lines if not FRAME.match(line)]
    while len(lines) > 1 and HEAD.match(lines[0].strip()):
        lines = lines[1:]
    # What stands below of an input function: its wildcards, of which ours have none that people know.
    lines = [line.strip() for line in lines[: lines.index("Wildcards:") if "Wildcards:" in lines else None]]
    if refused := OF_SYSTEM.match("\n".join(lines)):
        error = OSError(int(refused["number"]), refused["reason"], refused["file"])
        lines = [str(of_system(error) or refused["reason"])]
    return "\n".join(lines)


def configuration_files(arguments: Sequence[str]) -> list[str]:
    """The configuration files that Snakemake's command line names."""
    taken, files = False, list[str]()
    for argument in arguments:
        if argument.startswith("-"):
            option, _, value = argument.partition("=")
            taken = option in ("--configfile", "--configfiles")
            files += [value] if taken and value else []
        elif taken:
            files.append(argument)
    return files


def configuration_mistake(arguments: Sequence[str]) -> str | None:
    """What is wrong with the configuration files that Snakemake's command line names, before it has read any.

    It takes all that follows --configfile for such files, so that a target among them would be one.
    """
    for file in configuration_files(arguments):
        if Path(file).suffix.lower() not in (".yaml", ".yml", ".json"):
            return (
                f"{file} was taken for a configuration file, as all that follows --configfile is; write what is to be "
                f"made before it: snakemake {file} --cores 1 --configfile my.yaml"
            )
        try:
            config_file.read(file)
        except UserError as error:
            return str(error)
    return None


def is_of_failed_job(text: str) -> bool:
    """Whether this only says that some job has failed."""
    return bool(OF_FAILED_JOBS.search(text.strip()))


def killed_by(text: str) -> str | None:
    """The signal, such as SIGKILL, that a failed job's process died of."""
    found = KILLED.search(text)
    return found[1] if found else None
