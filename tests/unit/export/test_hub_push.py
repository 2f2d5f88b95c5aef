"""A model directory on the hub: the real client against a stand-in server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import COMMIT, serving

ROOT = Path(__file__).resolve().parents[3]
IN_A_PROCESS = """
import json, sys
from pathlib import Path
from adder.core.errors import UserError
from adder.export.hub_push import push
from adder.core.progress import Progress
folder, repo, private, message = json.loads(sys.argv[1])
try:
    print(json.dumps(push(Path(folder), repo, private, message, Progress("push"))))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


def push(
    folder: Path, url: str, repo: str = "me/mine", private: bool = True, token: str | None = "hf_right", **variables
):
    """Push in a process of its own: the client reads its environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "workflow_scripts"), "NO_PROXY": "127.0.0.1", **variables}
    if token:
        environment["HF_TOKEN"] = token
    arguments = json.dumps([str(folder), repo, private, "default: better by 80 points; " + "and more " * 20])
    command = [sys.executable, "-c", IN_A_PROCESS, arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "merged_model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes([number]) * 3000)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_gets_the_whole_folder_in_one_commit(model, tmp_path, private):
    with serving({}, owner="me", room=tmp_path / "hub") as hub:
        done = push(model, hub.url, private=private)
        assert done.returncode == 0, done.stderr
        wanted = {"repo": "me/mine", "private": private, "url": f"{hub.url}/me/mine", "commit": COMMIT}
        assert json.loads(done.stdout) == wanted
        assert hub.public == (() if private else ("me/mine",))
        assert files(tmp_path / "hub" / "me" / "mine") == files(model)
        (commit,) = hub.commits
        assert len(commit["summary"]) == 72 and commit["description"].startswith(commit["summary"][:-1])
        assert "push: uploading 0 MB to me/mine" in done.stderr
        # Again: nothing of the weights is sent anew.
        done = push(model, hub.url, private=private)
        assert done.returncode == 0, done.stderr
        assert [method for method, _, _ in hub.asked].count("PUT") == 2
    assert "hf_right" not in done.stdout + done.stderr


def test_no_weights_of_an_earlier_model_stay(model, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors", "pytorch_model.bin"):
        (there / name).write_bytes(b"old")
    (there / "NOTES.md").write_text("theirs")
    (there / ".gitattributes").write_text("*.safetensors filter=lfs")
    with serving({"me/mine": there}, owner="me") as hub:
        done = push(model, hub.url)
        assert done.returncode == 0, done.stderr
        removed = {path for kind, path in hub.commits[0]["operations"] if kind == "deletedFile"}
    assert removed == {"model-00003-of-00003.safetensors", "pytorch_model.bin"}
    assert files(there) == files(model) | {"NOTES.md": b"theirs", ".gitattributes": b"*.safetensors filter=lfs"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"token": None}, "to upload to me/mine, set HF_TOKEN to a token that may write there"),
        ({"token": "hf_wrong"}, "the hub doesn't know the token in HF_TOKEN"),
        ({"repo": "them/theirs"}, "may not write to them/theirs; it needs write access to what them owns"),
        ({"repo": "me/no..name"}, "'me/no..name' is no name of a repository; it reads owner/name"),
        ({"repo": "me/public"}, "me/public is public and export.private is true"),
        ({"HF_HUB_OFFLINE": "1"}, "the hub is out of reach (HF_HUB_OFFLINE, or no network): me/mine was not uploaded"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub is out of reach"),
    ],
)
def test_what_can_not_be_uploaded_is_said_in_one_sentence(model, tmp_path, how, message):
    repos = {"me/public": tmp_path / "public", "them/theirs": tmp_path / "theirs"}
    for folder in repos.values():
        folder.mkdir()
    with serving(repos, owner="me", room=tmp_path / "hub", public=("me/public",)) as hub:
        done = push(model, hub.url, **how)
        assert hub.commits == []
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("UserError: export.hub: ") and message in done.stderr
    assert "hf_wrong" not in done.stderr and "hf_right" not in done.stderr


def test_a_card_that_the_hub_refuses_stops_before_any_upload(model, tmp_path):
    with serving({}, owner="me", room=tmp_path / "hub", refusal='"license" must be one of') as hub:
        done = push(model, hub.url)
        assert not any(method == "PUT" for method, _, _ in hub.asked) and hub.commits == []
    assert done.returncode == 1
    assert (
        "UserError: export.hub: me/mine can't be uploaded" in done.stderr and '"license" must be one of' in done.stderr
    )
