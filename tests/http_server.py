"""A web server that behaves as badly as it is told to: it drops connections, ignores ranges, wants tokens."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

MODIFIED = "Tue, 05 Mar 2024 10:00:00 GMT"


@dataclass
class Web:
    """`files`: path → content. `drops`: after how many bytes the connection of each answer in turn breaks.

    `statuses`: what the next requests are answered with instead of a file. `marks`: "etag", "weak", "date" or "", what
    tells a file's content. `redirects`: path → URL. `asked`: (path with query, headers) of each request.
    """

    files: dict[str, bytes]
    drops: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    wrong_ranges: bool = False
    marks: str = "etag"
    authorization: str | None = None
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, dict]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(files: dict[str, bytes], **how) -> Iterator[Web]:
    """Serve while the block runs."""
    web = Web(files, **how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("WebHandler", (Handler,), {"web": web}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up is part of the game
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        web, path = self.web, urlsplit(self.path).path
        web.asked.append((self.path, dict(self.headers)))
        if path in web.redirects:
            return self.answer(302, b"", {"Location": web.redirects[path]})
        if web.statuses:
            return self.answer(web.statuses.pop(0), b"no", {})
        if web.authorization and self.headers.get("Authorization") != web.authorization:
            return self.answer(401, b"no", {})
        if path not in web.files:
            return self.answer(404, b"no", {})
        body = web.files[path]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        marks = {"etag": {"ETag": etag}, "weak": {"ETag": f"W/{etag}"}, "date": {"Last-Modified": MODIFIED}, "": {}}
        known = marks[web.marks]
        headers = self.headers
        if known and set(known.values()) & {headers.get("If-None-Match"), headers.get("If-Modified-Since")}:
            return self.answer(304, b"", known)
        wanted = headers.get("Range")
        if wanted and web.ranges and headers.get("If-Range") in (None, *known.values()):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            start = 0 if web.wrong_ranges else start
            where = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            return self.answer(206, body[start:], known | where)
        self.answer(200, body, known)

    def answer(self, status: int, body: bytes, headers: dict):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if status in (200, 206) and self.web.drops:
            self.wfile.write(body[: self.web.drops.pop(0)])
            self.close_connection = True
        elif status != 304:
            self.wfile.write(body)
