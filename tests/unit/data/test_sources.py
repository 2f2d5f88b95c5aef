"""Where rows come from: URLs, hub data sets, folders; resumed, checked, and without a secret anywhere."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import http_server
import hub_server
from adder.core import secrets
from adder.core.errors import UserError
from adder.core.files import read_json, read_jsonl
from adder.core.progress import Progress
from adder.data import fetch_rows, http_download
from adder.workflow import settings, stage_graph
from adder.workflow import stage_runner as stage

ROOT = Path(__file__).resolve().parents[3]
SNIPS = ROOT / "../shared/data/snips"
ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SECRET = "s3cr3t+/Päss&word"


@pytest.fixture(autouse=True)
def own_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDER_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(http_download, "FIRST_WAIT", 0.001)


def run_data(tmp_path, listed, name="data", **others):
    """(records, entries, reading, progress text) of the stage."""
    out = tmp_path / name
    out.mkdir()
    stream = io.StringIO()
    fetch_rows.run({"sources": listed, "heldout": None, **others}, {}, out, Progress("data", stream))
    records = list(read_jsonl(out / "rows.jsonl"))
    return records, read_json(out / "sources.json"), read_json(out / "reading.json"), stream.getvalue()


def data(records):
    return [record["data"] for record in records]


# URLs


@pytest.mark.parametrize("marks", ["etag", "date"])
def test_a_download_goes_on_where_the_connection_broke(tmp_path, marks):
    with http_server.serving({"/rows.jsonl": LINES}, drops=[1000, 2000], marks=marks) as web:
        records, entries, _, text = run_data(tmp_path, [{"url": f"{web.url}/rows.jsonl?page=1"}])
    assert data(records) == ROWS
    assert [headers.get("Range") for _, headers in web.asked] == [None, "bytes=1000-", "bytes=3000-"]
    assert entries[0]["path"] == f"{web.url}/rows.jsonl?page=1" and entries[0]["name"] == "rows"
    assert entries[0]["sha256"] == hashlib.sha256(LINES).hexdigest()
    assert "after 1,000 bytes; trying again" in text


@pytest.mark.parametrize("how", [{"ranges": False}, {"marks": ""}, {"marks": "weak"}, {"wrong_ranges": True}])
def test_a_download_starts_over_where_it_can_not_go_on(tmp_path, how):
    with http_server.serving({"/rows.jsonl": LINES}, drops=[1000], **how) as web:
        records, _, _, _ = run_data(tmp_path, [{"url": f"{web.url}/rows.jsonl"}])
    assert data(records) == ROWS


def test_a_file_that_changed_meanwhile_is_not_patched_together(tmp_path):
    url = {}
    with http_server.serving({"/rows.jsonl": LINES}, drops=[1000] * 99) as web:
        url = {"url": f"{web.url}/rows.jsonl"}
        web.drops, web.statuses = [1000], []
        web.files["/rows.jsonl"] = LINES
        original = http_download.time.sleep
        http_download.time.sleep = lambda _: web.files.update({"/rows.jsonl": LINES.replace(b"What", b"Whas")})
        try:
            records, _, _, _ = run_data(tmp_path, [url])
        finally:
            http_download.time.sleep = original
    assert data(records) == [{**row, "question": row["question"].replace("What", "Whas")} for row in ROWS]


KILLED = """
import json, os, sys
from pathlib import Path
from adder.data import fetch_rows
from adder.data import http_download as remote
from adder.core.progress import Progress
remote.time.sleep = lambda _: os._exit(9)
fetch_rows.run({"sources": [json.loads(sys.argv[1])]}, {}, Path(sys.argv[2]), Progress())
"""


def test_a_killed_stage_leaves_what_the_next_one_goes_on_from(tmp_path):
    (tmp_path / "killed").mkdir()
    with http_server.serving({"/rows.jsonl": LINES}, drops=[50_000]) as web:
        source = {"url": f"{web.url}/rows.jsonl"}
        environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
        command = [sys.executable, "-c", KILLED, json.dumps(source), str(tmp_path / "killed")]
        assert subprocess.run(command, env=environment, timeout=60, capture_output=True).returncode == 9
        records, _, _, _ = run_data(tmp_path, [source])
        assert data(records) == ROWS
        assert web.asked[1][1]["Range"] == "bytes=50000-"


def test_a_whole_file_is_fetched_again_only_if_it_changed(tmp_path):
    with http_server.serving({"/rows.jsonl": LINES}) as web:
        source = {"url": f"{web.url}/rows.jsonl"}
        run_data(tmp_path, [source], "one")
        records, _, _, _ = run_data(tmp_path, [source], "two")
        assert data(records) == ROWS and "If-None-Match" in web.asked[1][1]
        web.files["/rows.jsonl"] = b'{"a": 1}\n'
        records, _, _, _ = run_data(tmp_path, [source], "three")
        assert data(records) == [{"a": 1}]
    records, _, _, text = run_data(tmp_path, [source], "offline")
    assert data(records) == [{"a": 1}] and "out of reach" in text


def test_a_pinned_file_is_refused_if_it_is_another_and_not_asked_for_twice(tmp_path):
    digest = hashlib.sha256(LINES).hexdigest()
    with http_server.serving({"/rows.jsonl": LINES + b"\n"}) as web:
        source = {"url": f"{web.url}/rows.jsonl", "sha256": digest}
        with pytest.raises(UserError, match=rf"data.sources.0.url: .*rows.jsonl has SHA-256 .*, expected {digest}"):
            run_data(tmp_path, [source], "wrong")
        assert not list((tmp_path / "downloads").iterdir())
        web.files["/rows.jsonl"] = LINES
        run_data(tmp_path, [source], "right")
        asked = len(web.asked)
        run_data(tmp_path, [source], "again")
        assert len(web.asked) == asked


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(tmp_path):
    with http_server.serving({"/rows.jsonl": LINES}, statuses=[503, 429]) as web:
        records, _, _, text = run_data(tmp_path, [{"url": f"{web.url}/rows.jsonl"}], "busy")
        assert data(records) == ROWS and "HTTP 503" in text
        with pytest.raises(UserError, match=r"data.sources.0.url: .*none.jsonl can't be fetched: HTTP 404, no such"):
            run_data(tmp_path, [{"url": f"{web.url}/none.jsonl"}], "missing")
        assert len(web.asked) == 4
        web.statuses = [500] * 50
        with pytest.raises(UserError, match=r"can't be fetched: HTTP 500, 5 times in a row"):
            run_data(tmp_path, [{"url": f"{web.url}/other.jsonl"}], "down")
    with pytest.raises(UserError, match=r"other.jsonl can't be fetched: ConnectionError"):
        run_data(tmp_path, [{"url": f"{web.url}/other.jsonl"}], "gone")


def everything_written(folder: Path) -> bytes:
    paths = [path for path in folder.rglob("*") if "downloads" not in path.relative_to(folder).parts[0]]
    kept = [path for path in (folder / "downloads").glob("*") if path.suffix == ".json"]
    names = "\n".join(str(path) for path in folder.rglob("*"))
    return b"".join(path.read_bytes() for path in [*paths, *kept] if path.is_file()) + names.encode()


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ({"url": "{url}/rows.jsonl?sig=${{MY_SECRET}}"}, lambda path, headers: "sig=" in path),
        ({"url": "{url}/rows.jsonl", "token_env": "MY_SECRET"}, lambda path, headers: "Bearer" in str(headers)),
        ({"url": "http://me:${{MY_SECRET}}@{host}/rows.jsonl"}, lambda path, headers: "Basic" in str(headers)),
    ],
)
def test_a_secret_is_sent_and_written_nowhere(tmp_path, monkeypatch, source, seen, capfd):
    secret = "s3cr3t-" + "x9" * 8
    monkeypatch.setenv("MY_SECRET", secret)
    with http_server.serving({"/rows.jsonl": LINES}, drops=[100]) as web:
        source = {**source, "url": source["url"].format(url=web.url, host=web.url.removeprefix("http://"))}
        records, entries, _, text = run_data(tmp_path, [source])
        assert data(records) == ROWS and seen(*web.asked[-1])
        assert entries[0]["path"] == source["url"]
        for number, statuses in enumerate(([403], [500] * 9)):
            web.statuses = statuses
            with pytest.raises(UserError) as refused:
                other = source["url"].replace("rows.jsonl", "other.jsonl")
                run_data(tmp_path, [{**source, "url": other}], f"refused{number}")
            text += str(refused.value)
    with pytest.raises(UserError) as refused:
        run_data(tmp_path, [{**source, "url": other}], "unreachable")
    assert refused.value.__suppress_context__
    told = text + str(refused.value) + "".join(capfd.readouterr())
    assert secret not in told and b"%s" % secret.encode() not in everything_written(tmp_path)
    assert "token_env" in source or "${MY_SECRET}" in told


def test_no_secret_reaches_record_or_log_of_a_stage(tmp_path, monkeypatch):
    secret = "s3cr3t-" + "x9" * 8
    monkeypatch.setenv("MY_SECRET", secret)
    results = tmp_path / "results"
    with http_server.serving({"/rows.jsonl": LINES}) as web:
        for name in ("rows", "none"):
            source = {"url": f"{web.url}/{name}.jsonl?token=${{MY_SECRET}}", "token_env": "MY_SECRET"}
            arguments = ("data", "download", {"sources": [source]}, {}, results, name, results / f"{name}.log")
            if name == "rows":
                stage.execute(*arguments, function="run_data")
            else:
                with pytest.raises(SystemExit):
                    stage.execute(*arguments, function="run_data")
        assert secret in web.asked[0][0] and secret in web.asked[1][1]["Authorization"]
    record = (results / "stages/data/rows/stage.json").read_text()
    assert "${MY_SECRET}" in record and "HTTP 404" in (results / "none.log").read_text()
    written = [path for path in results.rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(secret.encode() in path.read_bytes() for path in written)


def test_messages_hide_a_secret_in_every_form(monkeypatch):
    monkeypatch.setenv("MY_SECRET", SECRET)
    address, hidden = secrets.filled_in("https://host/${MY_SECRET}?x=${MY_SECRET}", "here")
    assert SECRET in address
    from urllib.parse import quote, quote_plus

    error = OSError(f"{SECRET} {quote(SECRET)} {quote_plus(SECRET)} {SECRET!r} https://cdn/x?Signature=abc")
    text = secrets.without_secrets(error, hidden)
    assert not any(form in text for form in (SECRET, quote(SECRET), quote_plus(SECRET), "abc"))


def test_a_token_is_not_sent_to_another_host(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_abc")
    with http_server.serving({"/rows.jsonl": LINES}) as other, http_server.serving({}) as web:
        web.redirects["/rows.jsonl"] = other.url.replace("127.0.0.1", "localhost") + "/rows.jsonl"
        records, _, _, _ = run_data(tmp_path, [{"url": f"{web.url}/rows.jsonl", "token_env": "MY_TOKEN"}])
    assert data(records) == ROWS
    assert web.asked[0][1]["Authorization"] == "Bearer hf_abc"
    assert "Authorization" not in other.asked[0][1]


def test_missing_variables_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match=r"data.sources.0.url: .* environment variable NOT_SET, which is not set"):
        run_data(tmp_path, [{"url": "http://127.0.0.1:9/${NOT_SET}.jsonl"}], "one")
    with pytest.raises(UserError, match=r"data.sources.0.url: `token_env: NOT_SET`"):
        run_data(tmp_path, [{"url": "http://127.0.0.1:9/x.jsonl", "token_env": "NOT_SET"}], "two")


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://me:hunter2@host/x.jsonl", "what stands before @"),
        ("https://ghp_abcdef@host/x.jsonl", "what stands before @"),
        ("https://host/x.jsonl?token=hunter2", "`token`"),
        ("https://host/x.jsonl?a=1&X-Amz-Signature=hunter2", "`X-Amz-Signature`"),
        ("https://host/x.jsonl?sv=1&sig=hunter2", "`sig`"),
        ("https://host/x.jsonl?api_key=hunter2", "`api_key`"),
        ("ftp://me:hunter2@host/x.jsonl", "what stands before @"),
    ],
)
def test_a_secret_written_out_is_refused_without_repeating_it(url, what):
    with pytest.raises(UserError) as refused:
        secrets.refuse_secrets(url, "data.sources.0.url")
    assert what in str(refused.value) and "${NAME}" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("hunter2", "ghp_"))


@pytest.mark.parametrize(
    "url",
    [
        "https://host/x.jsonl?monkey=1&keyword=a&page_key_order=b",
        "https://me:${PASSWORD}@host/x.jsonl?token=${TOKEN}",
        "abfs://container@account.dfs.core.windows.net/x.jsonl",
        "s3://bucket/x.jsonl?versionId=3",
        "https://host/x.jsonl?${SIGNED}",
    ],
)
def test_other_urls_are_no_secret(url):
    secrets.refuse_secrets(url, "data.sources.0.url")


def test_compression_is_told_by_content_also_where_the_name_hides_it(tmp_path):
    packed = gzip.compress(LINES)
    with http_server.serving({"/rows.jsonl.gz": packed, "/rows.jsonl": packed}) as web:
        for number, name in enumerate(("rows.jsonl.gz", "rows.jsonl")):
            records, entries, _, _ = run_data(tmp_path, [{"url": f"{web.url}/{name}"}], f"data{number}")
            assert data(records) == ROWS and entries[0]["name"] == "rows" and entries[0]["kind"] == "jsonl"


def test_other_addresses_are_opened_by_fsspec(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("MY_SECRET", "abc")

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/rows.jsonl", LINES)
    records, entries, _, text = run_data(tmp_path, [{"url": "memory://bucket/rows.jsonl"}], "memory")
    assert data(records) == ROWS and entries[0]["path"] == "memory://bucket/rows.jsonl" and "fetching" in text
    _, _, _, text = run_data(tmp_path, [{"url": "memory://bucket/rows.jsonl"}], "unchanged")
    assert "fetching" not in text
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    records, _, _, _ = run_data(tmp_path, [{"url": f"file://{tmp_path}/rows.csv"}], "file")
    assert data(records) == [{"a": "1", "b": "2"}]
    for number, (url, message) in enumerate(
        [
            ("memory://bucket/none.jsonl", r"there is no file memory://bucket/none.jsonl"),
            ("memory://bucket/${MY_SECRET}", r"there is no file memory://bucket/\$\{MY_SECRET\}"),
            ("s3://bucket/rows.jsonl", r"s3:// needs a package that is not installed: pip install s3fs"),
            ("klingon://bucket/rows.jsonl", r"klingon://bucket/rows.jsonl is no address"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            run_data(tmp_path, [{"url": url}], f"refused{number}")
    with pytest.raises(UserError, match="`token_env` goes with http and https"):
        run_data(tmp_path, [{"url": "memory://bucket/rows.jsonl", "token_env": "MY_SECRET"}], "token")


def test_fsspec_goes_on_from_a_part(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/part.jsonl", LINES)
    url = "memory://bucket/part.jsonl"
    partial = http_download._Partial(http_download._place(url, url))
    partial.path.parent.mkdir(parents=True)
    partial.begin(memory.ukey("/bucket/part.jsonl"))
    partial.path.write_bytes(b"?" * 10 + LINES[10:1000])  # would not be asked for again
    records, _, _, _ = run_data(tmp_path, [{"url": url}])
    assert "error" in records[0] and data(records[1:]) == ROWS[1:]
    partial.begin("another content")
    partial.path.write_bytes(b"?" * 1000)
    partial.target.unlink()
    records, _, _, _ = run_data(tmp_path, [{"url": url}], "again")
    assert data(records) == ROWS


# Local files


def test_sha256_of_a_local_file_is_checked(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    (tmp_path / "more.jsonl").write_bytes(LINES)
    digest = hashlib.sha256(LINES).hexdigest()
    run_data(tmp_path, [{"path": str(tmp_path / "rows.jsonl"), "sha256": digest}], "right")
    with pytest.raises(UserError, match=rf"data.sources.0.sha256: .*rows.jsonl has SHA-256 {digest}, expected 0000"):
        run_data(tmp_path, [{"path": str(tmp_path / "rows.jsonl"), "sha256": "0" * 64}], "wrong")
    with pytest.raises(UserError, match=r"is the digest of one file; .*\*.jsonl stands for several"):
        run_data(tmp_path, [{"path": str(tmp_path / "*.jsonl"), "sha256": digest}], "several")


def test_tests_weights_and_columns_reach_reading_json(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"problem": "x"}\n')
    path = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}
    listed = [{"path": path["a"], "weight": 2.5, "row_format": "question_answer", "columns": {"question": "problem"}}]
    records, entries, reading, _ = run_data(
        tmp_path, listed, heldout={"sources": [{"path": path["b"]}]}, tests=[{"path": path["c"]}]
    )
    assert [(record["source"], record["split"]) for record in records] == [
        ("a", "train"),
        ("b", "heldout"),
        ("c", "test"),
    ]
    columns = {"question": "problem"}
    assert reading["a"] == {"row_format": "question_answer", "columns": columns, "weight": 2.5, "split": "train"}
    assert reading["c"] == {"row_format": "auto", "columns": {}, "weight": 1.0, "split": "test"}
    assert [entry["split"] for entry in entries] == ["train", "heldout", "test"] and entries[0]["weight"] == 2.5


def test_folders_that_datasets_saved(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict(train=whole, test=whole.select(range(5))).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(train=whole).save_to_disk(tmp_path / "one")
    for name in ("saved", "splits/test", "one"):
        records, entries, _, _ = run_data(tmp_path, [{"path": str(tmp_path / name)}], f"of-{name}".replace("/", "-"))
        assert data(records) == (ROWS[:5] if name == "splits/test" else ROWS)
        assert entries[0]["kind"] == "arrow" and len(entries[0]["sha256"]) == 64
        assert [record["row"] for record in records] == list(range(1, len(records) + 1))
    with pytest.raises(UserError, match=r"holds several splits; name the folder of one: .*splits/train, .*splits/test"):
        run_data(tmp_path, [{"path": str(tmp_path / "splits")}], "both")
    with pytest.raises(UserError, match="is a directory, and none that `datasets` saved"):
        run_data(tmp_path, [{"path": str(tmp_path)}], "neither")


@pytest.mark.skipif(not SNIPS.exists(), reason="needs the SNIPS files in ../shared/data")
def test_of_several_encodings_each_snips_file_is_read_in_the_first_that_fits(tmp_path):
    source = {
        "path": str(SNIPS / "*.json"),
        "convert": str(ROOT / "config/examples/snips.py"),
        "encoding": ["utf-8", "latin-1"],
    }
    records, entries, _, _ = run_data(tmp_path, [source])
    assert len(records) == 13_784 + 700 and not any("error" in record for record in records)
    assert {entry["name"] for entry in entries if entry["encoding"] == "latin-1"} == {"train_PlayMusic_full"}
    assert {entry["encoding"] for entry in entries} == {"utf-8", "latin-1"}
    with pytest.raises(UserError, match=r"PlayMusic_full.json: byte \d+ \(0x..\) is not valid utf-8, byte"):
        run_data(tmp_path, [{**source, "encoding": ["utf-8", "ascii"]}], "neither")


# Hub data sets

IN_A_PROCESS = """
import json, sys
from pathlib import Path
from adder.data import fetch_rows
from adder.core.errors import UserError
from adder.core.progress import Progress
outs = json.loads(sys.argv[2])
for source, out in zip(json.loads(sys.argv[1]), outs):
    Path(out).mkdir(parents=True)
    try:
        fetch_rows.run({"sources": [source]}, {}, Path(out), Progress())
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
    for number, part in enumerate((ROWS[:2000], ROWS[2000:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"main/train-{number:05}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:7]), folder / "main/test.parquet")
    (folder / "socratic/rows.jsonl.gz").write_bytes(gzip.compress(LINES))
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
        assert data(read_jsonl(out / "rows.jsonl")) == ROWS
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
    assert data(read_jsonl(outs[0] / "rows.jsonl")) == ROWS, right
    assert "hf_wrong" not in text
    assert not any("hf_right" in path.read_text() for path in outs[0].iterdir()) and "hf_right" not in right


# Memory

TO_TEXT = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": lambda rows: json.dumps({"data": rows}),
    "csv": lambda rows: "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows),
}
MEASURED = """
import re, sys
from pathlib import Path
from adder.data import fetch_rows
from adder.core.progress import Progress
fetch_rows.run({"sources": [{"path": sys.argv[1]}]}, {}, Path(sys.argv[2]), Progress.silent())
# Not getrusage: its peak begins with the process that started this one.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("ending", "few", "many"), [("jsonl", 50_000, 400_000), ("json", 20_000, 100_000), ("csv", 20_000, 100_000)]
)
def test_memory_does_not_grow_with_the_file(tmp_path, ending, few, many):
    peaks = {}
    for count in (few, many):
        made = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(count)]
        path = tmp_path / f"rows{count}.{ending}"
        path.write_text(TO_TEXT[ending](made))
        del made
        out = tmp_path / f"out{count}"
        out.mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path), str(out)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout)
        assert sum(1 for _ in (out / "rows.jsonl").open("rb")) == count
    assert peaks[many] - peaks[few] < 30, f"megabytes by rows: {peaks}"


# What stands for a source in the key of its stage


def identity(project, *listed):
    config = {"model": {"source": "wheel:x==1"}, "data": {"sources": list(listed)}}
    run = settings.load(config)["default"]
    return stage_graph.stages_of_run("default", run, [], project, stage_graph.Digests(project / "digests.json"))[
        "data"
    ].key


def test_a_source_counts_by_content_where_it_is_local_and_by_its_settings_elsewhere(tmp_path, monkeypatch):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS[:3]).save_to_disk(folder)
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    monkeypatch.setenv("MY_SECRET", "one")
    local, saved = {"path": "rows.jsonl"}, {"path": "saved"}
    web = {"url": "https://host/rows.jsonl?sig=${MY_SECRET}"}
    hub = {"hub": "org/sums", "revision": "main"}
    keys = [identity(tmp_path, source) for source in (local, saved, web, hub)]
    assert len(set(keys)) == 4
    monkeypatch.setenv("MY_SECRET", "two")
    (tmp_path / "rows.jsonl").touch()
    assert [identity(tmp_path, source) for source in (local, saved, web, hub)] == keys
    for source, changes in (
        (local, [{"weight": 2.0}, {"row_format": "text"}, {"columns": {"text": "answer"}}, {"license": "mit"}]),
        (web, [{"sha256": "0" * 64}]),
        (hub, [{"revision": "v2"}, {"config": "main"}, {"split": "test"}]),
    ):
        for change in changes:
            assert identity(tmp_path, {**source, **change}) not in keys
    (folder / "state.json").write_text((folder / "state.json").read_text() + " ")
    assert identity(tmp_path, saved) != keys[1]
    with pytest.raises(UserError, match="data.sources.0.url: `token` in this URL looks like a secret"):
        identity(tmp_path, {"url": "https://host/x.jsonl?token=abc"})
