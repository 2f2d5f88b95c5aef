"""Files from URLs: resumed, checked, and without a secret anywhere."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import http_server
from adder.core import file_lock
from adder.core.errors import UserError
from adder.data import http_download
from data_stages import SUM_LINES, SUMS, Written, data, write_rows

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("downloads")


@pytest.mark.parametrize("marks", ["etag", "date"])
def test_a_download_goes_on_where_the_connection_broke(tmp_path, marks):
    with http_server.serving({"/rows.jsonl": SUM_LINES}, drops=[1000, 2000], marks=marks) as web:
        _, records, entries, _, text = write_rows(tmp_path / "data", [{"url": f"{web.url}/rows.jsonl?page=1"}])
    assert data(records) == SUMS
    assert [headers.get("Range") for _, headers in web.asked] == [None, "bytes=1000-", "bytes=3000-"]
    assert entries[0]["path"] == f"{web.url}/rows.jsonl?page=1" and entries[0]["name"] == "rows"
    assert entries[0]["sha256"] == hashlib.sha256(SUM_LINES).hexdigest()
    assert "after 1,000 bytes; trying again" in text


@pytest.mark.parametrize("how", [{"ranges": False}, {"marks": ""}, {"marks": "weak"}, {"wrong_ranges": True}])
def test_a_download_starts_over_where_it_can_not_go_on(tmp_path, how):
    with http_server.serving({"/rows.jsonl": SUM_LINES}, drops=[1000], **how) as web:
        _, records, *_ = write_rows(tmp_path / "data", [{"url": f"{web.url}/rows.jsonl"}])
    assert data(records) == SUMS


def test_a_file_that_changed_meanwhile_is_not_patched_together(tmp_path):
    url = {}
    with http_server.serving({"/rows.jsonl": SUM_LINES}, drops=[1000] * 99) as web:
        url = {"url": f"{web.url}/rows.jsonl"}
        web.drops, web.statuses = [1000], []
        web.files["/rows.jsonl"] = SUM_LINES
        original = http_download.time.sleep
        http_download.time.sleep = lambda _: web.files.update({"/rows.jsonl": SUM_LINES.replace(b"What", b"Whas")})
        try:
            _, records, *_ = write_rows(tmp_path / "data", [url])
        finally:
            http_download.time.sleep = original
    assert data(records) == [{**row, "question": row["question"].replace("What", "Whas")} for row in SUMS]


KILLED = """
import json, os, sys
from pathlib import Path
from adder.data import fetch_rows
from adder.data import http_download
from adder.data.stage import RowSettings
from adder.core.progress import Progress
from adder.core.stage_spec import Context, NoInputs
http_download.time.sleep = lambda _: os._exit(9)
settings = RowSettings.model_validate({"sources": [json.loads(sys.argv[1])]})
fetch_rows.run(settings, NoInputs(), Path(sys.argv[2]), Context(Progress()))
"""


def test_a_killed_stage_leaves_what_the_next_one_goes_on_from(tmp_path):
    (tmp_path / "killed").mkdir()
    with http_server.serving({"/rows.jsonl": SUM_LINES}, drops=[50_000]) as web:
        source = {"url": f"{web.url}/rows.jsonl"}
        environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
        command = [sys.executable, "-c", KILLED, json.dumps(source), str(tmp_path / "killed")]
        assert subprocess.run(command, env=environment, timeout=60, capture_output=True).returncode == 9
        _, records, *_ = write_rows(tmp_path / "data", [source])
        assert data(records) == SUMS
        assert web.asked[1][1]["Range"] == "bytes=50000-"


def test_a_whole_file_is_fetched_again_only_if_it_changed(tmp_path):
    with http_server.serving({"/rows.jsonl": SUM_LINES}) as web:
        source = {"url": f"{web.url}/rows.jsonl"}
        write_rows(tmp_path / "one", [source])
        _, records, *_ = write_rows(tmp_path / "two", [source])
        assert data(records) == SUMS and "If-None-Match" in web.asked[1][1]
        web.files["/rows.jsonl"] = b'{"a": 1}\n'
        _, records, *_ = write_rows(tmp_path / "three", [source])
        assert data(records) == [{"a": 1}]
    _, records, _, _, text = write_rows(tmp_path / "offline", [source])
    assert data(records) == [{"a": 1}] and "out of reach" in text


def test_a_pinned_file_is_refused_if_it_is_another_and_not_asked_for_twice(tmp_path):
    digest = hashlib.sha256(SUM_LINES).hexdigest()
    with http_server.serving({"/rows.jsonl": SUM_LINES + b"\n"}) as web:
        source = {"url": f"{web.url}/rows.jsonl", "sha256": digest}
        with pytest.raises(UserError, match=rf"data.sources.0.url: .*rows.jsonl has SHA-256 .*, expected {digest}"):
            write_rows(tmp_path / "wrong", [source])
        assert not list((tmp_path / "downloads").iterdir())
        web.files["/rows.jsonl"] = SUM_LINES
        write_rows(tmp_path / "right", [source])
        asked = len(web.asked)
        write_rows(tmp_path / "again", [source])
        assert len(web.asked) == asked


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(tmp_path):
    with http_server.serving({"/rows.jsonl": SUM_LINES}, statuses=[503, 429]) as web:
        _, records, _, _, text = write_rows(tmp_path / "busy", [{"url": f"{web.url}/rows.jsonl"}])
        assert data(records) == SUMS and "HTTP 503" in text
        with pytest.raises(UserError, match=r"data.sources.0.url: .*none.jsonl can't be fetched: HTTP 404, no such"):
            write_rows(tmp_path / "missing", [{"url": f"{web.url}/none.jsonl"}])
        assert len(web.asked) == 4
        web.statuses = [500] * 50
        with pytest.raises(UserError, match=r"can't be fetched: HTTP 500, 5 times in a row"):
            write_rows(tmp_path / "down", [{"url": f"{web.url}/other.jsonl"}])
    with pytest.raises(UserError, match=r"other.jsonl can't be fetched: ConnectionError"):
        write_rows(tmp_path / "gone", [{"url": f"{web.url}/other.jsonl"}])


def test_a_file_that_another_process_fetches_is_waited_for(tmp_path):
    found: list[Written] = []
    with http_server.serving({"/rows.jsonl": SUM_LINES}) as web:
        url = f"{web.url}/rows.jsonl"
        lock = http_download._beside(http_download._place(url, url), ".lock")
        waiting = threading.Thread(target=lambda: found.append(write_rows(tmp_path / "data", [{"url": url}])))
        with file_lock.held(lock, pytest.fail):
            waiting.start()
            waiting.join(0.5)
            assert waiting.is_alive() and not web.asked
        waiting.join(60)
    assert data(found[0].records) == SUMS and not lock.exists()
    assert f"another process (process {os.getpid()} on " in found[0].shown
    assert f"is fetching {url}; waiting for it" in found[0].shown


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
    with http_server.serving({"/rows.jsonl": SUM_LINES}, drops=[100]) as web:
        source = {**source, "url": source["url"].format(url=web.url, host=web.url.removeprefix("http://"))}
        _, records, entries, _, text = write_rows(tmp_path / "data", [source])
        assert data(records) == SUMS and seen(*web.asked[-1])
        assert entries[0]["path"] == source["url"]
        for number, statuses in enumerate(([403], [500] * 9)):
            web.statuses = statuses
            with pytest.raises(UserError) as refused:
                other = source["url"].replace("rows.jsonl", "other.jsonl")
                write_rows(tmp_path / f"refused{number}", [{**source, "url": other}])
            text += str(refused.value)
    with pytest.raises(UserError) as refused:
        write_rows(tmp_path / "unreachable", [{**source, "url": other}])
    assert refused.value.__suppress_context__
    told = text + str(refused.value) + "".join(capfd.readouterr())
    assert secret not in told and b"%s" % secret.encode() not in everything_written(tmp_path)
    assert "token_env" in source or "${MY_SECRET}" in told


def test_a_token_is_not_sent_to_another_host(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_abc")
    with http_server.serving({"/rows.jsonl": SUM_LINES}) as other, http_server.serving({}) as web:
        web.redirects["/rows.jsonl"] = other.url.replace("127.0.0.1", "localhost") + "/rows.jsonl"
        _, records, *_ = write_rows(tmp_path / "data", [{"url": f"{web.url}/rows.jsonl", "token_env": "MY_TOKEN"}])
    assert data(records) == SUMS
    assert web.asked[0][1]["Authorization"] == "Bearer hf_abc"
    assert "Authorization" not in other.asked[0][1]


def test_missing_variables_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match=r"data.sources.0.url: .* environment variable NOT_SET, which is not set"):
        write_rows(tmp_path / "one", [{"url": "http://127.0.0.1:9/${NOT_SET}.jsonl"}])
    with pytest.raises(UserError, match=r"data.sources.0.url: `token_env: NOT_SET`"):
        write_rows(tmp_path / "two", [{"url": "http://127.0.0.1:9/x.jsonl", "token_env": "NOT_SET"}])


def test_compression_is_told_by_content_also_where_the_name_hides_it(tmp_path):
    packed = gzip.compress(SUM_LINES)
    with http_server.serving({"/rows.jsonl.gz": packed, "/rows.jsonl": packed}) as web:
        for number, name in enumerate(("rows.jsonl.gz", "rows.jsonl")):
            _, records, entries, *_ = write_rows(tmp_path / f"data{number}", [{"url": f"{web.url}/{name}"}])
            assert data(records) == SUMS and entries[0]["name"] == "rows" and entries[0]["kind"] == "jsonl"


def test_other_addresses_are_opened_by_fsspec(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("MY_SECRET", "abc")

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/rows.jsonl", SUM_LINES)
    _, records, entries, _, text = write_rows(tmp_path / "memory", [{"url": "memory://bucket/rows.jsonl"}])
    assert data(records) == SUMS and entries[0]["path"] == "memory://bucket/rows.jsonl" and "fetching" in text
    _, _, _, _, text = write_rows(tmp_path / "unchanged", [{"url": "memory://bucket/rows.jsonl"}])
    assert "fetching" not in text
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    _, records, *_ = write_rows(tmp_path / "file", [{"url": f"file://{tmp_path}/rows.csv"}])
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
            write_rows(tmp_path / f"refused{number}", [{"url": url}])
    with pytest.raises(UserError, match="`token_env` goes with http and https"):
        write_rows(tmp_path / "token", [{"url": "memory://bucket/rows.jsonl", "token_env": "MY_SECRET"}])


def test_fsspec_goes_on_from_a_part(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/part.jsonl", SUM_LINES)
    url = "memory://bucket/part.jsonl"
    partial = http_download._Partial(http_download._place(url, url))
    partial.path.parent.mkdir(parents=True)
    partial.begin(memory.ukey("/bucket/part.jsonl"))
    partial.path.write_bytes(b"?" * 10 + SUM_LINES[10:1000])  # would not be asked for again
    _, records, *_ = write_rows(tmp_path / "data", [{"url": url}])
    assert "error" in records[0] and data(records[1:]) == SUMS[1:]
    partial.begin("another content")
    partial.path.write_bytes(b"?" * 1000)
    partial.target.unlink()
    _, records, *_ = write_rows(tmp_path / "again", [{"url": url}])
    assert data(records) == SUMS
