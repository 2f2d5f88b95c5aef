"""A stand-in for the hub's HTTP interface: what the real huggingface_hub client asks for, served from folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repos` and `datasets`: id → folder; `gated`: ids that want `token`; `drops`: after how many bytes the
    connection of each file in turn breaks; `asked`: (method, path, authorization) of each request.
    """

    daemon_threads = True

    def __init__(
        self,
        repos: dict[str, Path] | None = None,
        datasets: dict[str, Path] | None = None,
        gated: tuple[str, ...] = (),
        token: str = "hf_right",
        drops: tuple[int, ...] = (),
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.datasets, self.gated, self.token = repos or {}, datasets or {}, gated, token
        self.drops = list(drops)
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(repos: dict[str, Path] | None = None, **how) -> Iterator[Hub]:
    """Serve while the block runs."""
    hub = Hub(repos, **how)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):  # noqa: N802
        self.answer()

    def do_GET(self):  # noqa: N802
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.server.asked.append((self.command, path, authorization))
        is_api = path.startswith("/api/")
        # Models have their ids at the root, data sets below /datasets; the interface has both below a word.
        path = path.removeprefix("/api/models").removeprefix("/api").lstrip("/")
        kind = self.server.datasets if path.startswith("datasets/") else self.server.repos
        path = path.removeprefix("datasets/")
        repo = next((name for name in kind if path == name or path.startswith(f"{name}/")), None)
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        what, _, rest = path.removeprefix(repo).lstrip("/").partition("/")
        revision = rest.split("/")[0]
        if revision not in ("", "main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        # The hub tells anybody what a gated repository holds, and keeps its files.
        if repo in self.server.gated and not is_api and authorization != f"Bearer {self.server.token}":
            return self.refuse(403, "GatedRepo")
        folder = kind[repo]
        if what == "resolve":
            return self.file(folder / rest.partition("/")[2])
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if what == "tree":
            return self.json([self.tree_entry(folder, file) for file in files])
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        self.json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})

    def tree_entry(self, folder: Path, file: Path) -> dict:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

    def file(self, path: Path):
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send(206 if start else 200, body[start:], "application/octet-stream", headers)

    def json(self, value):
        self.send(200, json.dumps(value).encode(), "application/json", {})

    def refuse(self, status: int, code: str):
        self.send(status, b"{}", "application/json", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, kind: str, headers: dict):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "application/octet-stream" and len(body) > 1000 and self.server.drops:
            body = body[: self.server.drops.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
