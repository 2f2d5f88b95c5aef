"""What no configured run needs is found, with the room that it takes; what one needs stays."""

from pathlib import Path

from adder.core.file_digests import FileDigests
from adder.core.files import write_json
from adder.workflow import prune
from adder.workflow.stage_graph import Stage
from adder.workflow.stage_runner import link_tree
from adder.workflow.stages import SPECS


def finished(results: Path, name: str, key: str, fingerprint: str) -> Path:
    """A finished stage's folder, whose files the cache has as well."""
    folder = results / "stages" / name / key
    folder.mkdir(parents=True)
    (folder / "result.txt").write_text("a result")
    write_json(folder / "stage.json", {"fingerprint": fingerprint})
    link_tree(folder, results / "cache" / name / fingerprint, FileDigests.of_results(results))
    return folder


def test_what_is_needed_stays(tmp_path):
    needed = Stage(SPECS["format"], SPECS["format"].settings.model_construct(), {"a": 1})
    kept = finished(tmp_path, "format", needed.key, "new")
    old = finished(tmp_path, "format", "0" * 12, "old")
    killed = tmp_path / "stages" / "format" / f".{needed.key}.partial"
    killed.mkdir()
    (tmp_path / "checkpoints" / "f" / "checkpoint-1").mkdir(parents=True)
    write_json(tmp_path / "checkpoints" / "f.attempts.json", [1.5])
    found = prune.unneeded(tmp_path, {needed.folder: needed})
    checkpoints = [tmp_path / "checkpoints" / name for name in ("f", "f.attempts.json")]
    assert found == sorted([old, tmp_path / "cache" / "format" / "old", killed, *checkpoints])
    assert prune.freed_bytes([old]) == 0  # every file of it has a link in the cache
    assert prune.freed_bytes(found) > len("a result")
    prune.remove(found, FileDigests.of_results(tmp_path))
    assert kept.exists() and not any(path.exists() for path in found)


def test_checkpoints_stay_while_a_stage_that_continues_has_not_finished(tmp_path):
    judge = Stage(SPECS["judge"], SPECS["judge"].settings.model_construct(), {"a": 1})
    (tmp_path / "checkpoints" / "f").mkdir(parents=True)
    assert prune.unneeded(tmp_path, {judge.folder: judge}) == []
    finished(tmp_path, "judge", judge.key, "f")
    assert prune.unneeded(tmp_path, {judge.folder: judge}) == [tmp_path / "checkpoints" / "f"]
