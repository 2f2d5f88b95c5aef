"""Running a stage beside its earlier results, as the workflow does, and comparing what came out."""

from pathlib import Path

from adder.core.files import digest_file
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Earlier, Runtime
from adder.workflow.code_digest import code_digest


def context_beside(*folders: Path, threads: int = 1) -> Context:
    """A context with the folders of earlier results; without any, one that computes all and keeps it for later."""
    return Context(Progress.silent(), Runtime(threads=threads), earlier=Earlier(folders, code_digest))


def digests(folder: Path) -> dict[str, str]:
    """Digest of each file below a folder, by path."""
    return {str(path.relative_to(folder)): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
