"""Data sets of the hub: the real client against a stand-in server."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hub_server
from adder.core.files import read_json, read_jsonl
from data_stages import SUM_LINES, SUMS, data

ROOT = Path(__file__).resolve().parents[3]


IN_A_PROCESS = """
import json, sys
from pathlib import Path
from adder.data import fetch_rows
from adder.core.errors import UserError
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
from adder.data.stage import RowSettings
outs = json.loads(sys.argv[2])
for source, out in zip(json.loads(sys.argv[1]), outs):
    Path(out).mkdir(parents=True)
    try:
        settings = RowSettings.model_validate({"sources": [source]})
        fetch_rows.run(settings, NoInputs(), Path(out), Context(Progress()))
    except UserError as error:
        print(f"UserError: {error}", file=sys.stderr)
"""


def run_hub(tmp_path, url, listed, token=None, offline="0"):
    """Run the stage for each source in one process of its own: the client reads its environment when imported.

    Returns the folders and what was said. The client's cache is the same for all of a test.
    """
    outs = [tmp_path / f"out-{len(list(tmp_path.glob('out-*'))) + n}" for n in range(len(listed))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT / "workflow_scripts"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps(listed), json.dumps([str(out) for out in outs])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return outs, done.stderr


CARD = """---
license:
- cc-by-4.0
- mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*.parquet
  - split: test
    path: main/test.parquet
- config_name: socratic
  data_files:
  - {split: train, path: socratic/rows.jsonl.gz}
---
Rows.
"""


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for number, part in enumerate((SUMS[:2000], SUMS[2000:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"main/train-{number:05}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(SUMS[:7]), folder / "main/test.parquet")
    (folder / "socratic/rows.jsonl.gz").write_bytes(gzip.compress(SUM_LINES))
    (folder / "huge.bin").write_bytes(b"never asked for")
    return folder


def test_hub_data_set_is_pinned_and_only_its_split_is_fetched(tmp_path, repo):
    with hub_server.serving(datasets={"org/sums": repo}, drops=(500,)) as hub:
        listed = [
            {"hub": "org/sums", "revision": "main"},
            {"hub": "org/sums", "config": "socratic"},
        ]
        outs, text = run_hub(tmp_path, hub.url, listed)
        fetched = {path.partition("/resolve/")[2] for method, path, _ in hub.asked if method == "GET"} - {""}
        assert {authorization for _, _, authorization in hub.asked} == {None}
        url = hub.url
    names = ["README.md", "main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"]
    assert fetched == {f"{hub_server.COMMIT}/{name}" for name in [*names, "socratic/rows.jsonl.gz"]}, text
    for out in outs:
        assert data(read_jsonl(out / "rows.jsonl")) == SUMS
    entries = read_json(outs[0] / "sources.json")
    assert [entry["name"] for entry in entries] == ["sums-main-train-1", "sums-main-train-2"]
    assert {entry["revision"] for entry in entries} == {hub_server.COMMIT}
    assert entries[0]["license"] == "cc-by-4.0, mit" and entries[0]["kind"] == "parquet"
    assert entries[0]["path"] == "org/sums/main/train-00000-of-00002.parquet"
    assert read_json(outs[1] / "sources.json")[0]["name"] == "sums-socratic-train"

    # The server is gone: what the cache holds whole is as good, and what it lacks is not passed over.
    again, text = run_hub(tmp_path, url, [{"hub": "org/sums", "revision": hub_server.COMMIT}])
    assert (again[0] / "sources.json").read_bytes() == (outs[0] / "sources.json").read_bytes(), text
    again, text = run_hub(tmp_path, url, [{"hub": "org/sums"}, {"hub": "org/sums", "split": "test"}], offline="1")
    assert (again[0] / "rows.jsonl").read_bytes() == (outs[0] / "rows.jsonl").read_bytes(), text
    assert "UserError: data.sources.0.hub: org/sums is not whole in the hub's cache" in text


def test_files_of_a_hub_data_set_without_a_card_go_by_their_names(tmp_path):
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "data/train.csv").write_text("q;a\n1;2\n".replace(";", ","))
    (folder / "data/validation.csv").write_text("q,a\n3,4\n")
    with hub_server.serving(datasets={"org/plain": folder}) as hub:
        listed = [{"hub": "org/plain"}, {"hub": "org/plain", "split": "validation"}]
        outs, text = run_hub(tmp_path, hub.url, listed)
    assert data(read_jsonl(outs[0] / "rows.jsonl")) == [{"q": "1", "a": "2"}], text
    assert data(read_jsonl(outs[1] / "rows.jsonl")) == [{"q": "3", "a": "4"}]
    entry = read_json(outs[1] / "sources.json")[0]
    assert (entry["name"], entry["license"]) == ("plain-validation", None)


def test_hub_refusals_say_what_there_is(tmp_path, repo):
    (repo / "README.md").write_text(CARD.replace("  default: true\n", ""))
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit")
    repos = {"org/sums": repo, "org/gated": repo, "org/script": script}
    expected = [
        ({"hub": "org/sums"}, "org/sums has several configurations; set `config:`, it has: main, socratic"),
        (
            {"hub": "org/sums", "config": "main", "split": "dev"},
            "has no split 'dev' in its configuration 'main'; it has: train, test",
        ),
        ({"hub": "org/sums", "config": "x"}, "org/sums has no configuration 'x'; it has: main, socratic"),
        ({"hub": "org/sums", "revision": "v9"}, "org/sums has no revision 'v9'"),
        ({"hub": "org/none"}, "org/none is not a data set on the hub"),
        ({"hub": "org/gated"}, "org/gated is gated: accept its terms on its hub page, then set HF_TOKEN"),
        ({"hub": "org/script"}, "try `revision: refs/convert/parquet`"),
    ]
    with hub_server.serving(datasets=repos, gated=("org/gated",)) as hub:
        _, text = run_hub(tmp_path, hub.url, [source for source, _ in expected], token="hf_wrong")
        for _, message in expected:
            assert message in text
        assert text.count("UserError: data.sources.0.hub: org/") == len(expected)
        outs, right = run_hub(tmp_path, hub.url, [{"hub": "org/gated", "config": "main"}], token="hf_right")
    assert data(read_jsonl(outs[0] / "rows.jsonl")) == SUMS, right
    assert "hf_wrong" not in text
    assert not any("hf_right" in path.read_text() for path in outs[0].iterdir()) and "hf_right" not in right
