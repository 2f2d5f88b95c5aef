"""A stand-in for the hub's HTTP interface: what the real huggingface_hub client asks for, served from folders."""

import base64
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

    With `owner`, `token` may write to that owner's repositories, and make new ones in `room`, a folder; `public`: ids
    that everybody sees; `commits`: {"summary", "description", "operations": [(kind, path)]} of each commit;
    `refusal`: what the hub has against every model card.
    """

    daemon_threads = True

    def __init__(
        self,
        repos: dict[str, Path] | None = None,
        datasets: dict[str, Path] | None = None,
        gated: tuple[str, ...] = (),
        token: str = "hf_right",
        drops: tuple[int, ...] = (),
        owner: str | None = None,
        room: Path | None = None,
        public: tuple[str, ...] = (),
        refusal: str | None = None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.datasets, self.gated, self.token = repos or {}, datasets or {}, gated, token
        self.drops = list(drops)
        self.owner, self.room, self.public, self.refusal = owner, room, public, refusal
        self.large: dict[str, bytes] = {}  # files stored beside git, by their SHA-256
        self.commits: list[dict] = []
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

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
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
        found = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}
        self.json(found | {"private": repo not in self.server.public})

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, path, authorization))
        if authorization != f"Bearer {self.server.token}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            errors = [{"message": self.server.refusal}] if self.server.refusal else []
            return self.json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo = next((name for name in self.server.repos if f"/{name}/" in path or f"/{name}.git/" in path), None)
        if repo is None or repo.split("/")[0] != self.server.owner:
            return self.refuse(403, "", "You don't have the rights")
        what = path.partition(repo)[2].strip("/").split("/")[0]
        if what == "preupload":
            return self.json({"files": [self.upload_mode(file) for file in json.loads(body)["files"]]})
        if what == ".git":
            return self.json(
                {"transfer": "basic", "objects": [self.upload(one) for one in json.loads(body)["objects"]]}
            )
        if what == "commit":
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.refuse(404, "EntryNotFound")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        assert self.path == f"/upload/{hashlib.sha256(body).hexdigest()}"
        self.server.large[self.path.rpartition("/")[2]] = body
        self.json({})

    def create(self, wanted: dict):
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repos:
            return self.json({"error": "exists already", "url": f"{self.server.url}/{name}"}, 409)
        if wanted["organization"] != self.server.owner:
            return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        if wanted["visibility"] == "public":
            self.server.public = (*self.server.public, name)
        self.server.repos[name] = self.server.room / name
        self.server.repos[name].mkdir(parents=True)
        self.json({"url": f"{self.server.url}/{name}"})

    def upload_mode(self, file: dict) -> dict:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def upload(self, wanted: dict) -> dict:
        action = {"upload": {"href": f"{self.server.url}/upload/{wanted['oid']}"}}
        return {**wanted, **({} if wanted["oid"] in self.server.large else {"actions": action})}

    def commit(self, repo: str, lines: list[dict]):
        folder, operations = self.server.repos[repo], []
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            operations.append((kind, value["path"]))
            if kind == "deletedFile":
                (folder / value["path"]).unlink()
            else:
                small = kind == "file"
                content = base64.b64decode(value["content"]) if small else self.server.large[value["oid"]]
                (folder / value["path"]).write_bytes(content)
        self.server.commits.append({**lines[0]["value"], "operations": operations})
        self.json({"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

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

    def json(self, value, status: int = 200):
        self.send(status, json.dumps(value).encode(), "application/json", {})

    def refuse(self, status: int, code: str, message: str | None = None):
        self.send(status, b"{}", "application/json", {"X-Error-Code": code, "X-Error-Message": message or code})

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
