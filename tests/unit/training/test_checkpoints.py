"""Only a sealed checkpoint is continued from."""

from adder.training import checkpoints


def test_a_damaged_checkpoint_is_not_continued_from(tmp_path):
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("whole")
        checkpoints.seal(folder)
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_text("cut o")
    (tmp_path / "checkpoint-4" / "seal.json").unlink()
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
