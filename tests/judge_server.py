"""A judge behind a real HTTP server that speaks the OpenAI-compatible interface, and misbehaves as it is told to."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PART = r"\[{name} \w+\]\n(.*?)\n\[end of {name} \w+\]"


@dataclass
class Judge:
    """`decide(reply A, reply B)` gives the whole text of an answer. `statuses`: (status, headers) of the next requests
    instead of an answer; `texts`: answers to give before any that is decided; `key`: what it wants to be shown.

    `asked`: (path, headers, body) of each request.
    """

    decide: Callable[[str, str], str]
    statuses: list[tuple[int, dict]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    key: str | None = None
    delay: float = 0.0
    asked: list[tuple[str, dict, dict]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


def verdict(better: str) -> str:
    """An answer as a judge should give it."""
    return json.dumps({"reason": f"{better} is better.", "better": better})


def prefer_longer(a: str, b: str) -> str:
    """The judge for whom more is better."""
    return verdict("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B")


def prefer_first(a: str, b: str) -> str:
    """The judge that has stopped reading."""
    return verdict("A")


@contextmanager
def judging(decide: Callable[[str, str], str] = prefer_longer, **how) -> Iterator[Judge]:
    """Serve while the block runs."""
    judge = Judge(decide, **how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("JudgeHandler", (Handler,), {"judge": judge}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up is part of the game
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    judge: Judge
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.asked.append((self.path, dict(self.headers), body))
            status, headers = judge.statuses.pop(0) if judge.statuses else (200, {})
            text = judge.texts.pop(0) if judge.texts and status == 200 else None
        threading.Event().wait(judge.delay)
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"error": {"message": "no such path"}}, {})
        if judge.key and self.headers.get("Authorization") != f"Bearer {judge.key}":
            return self.answer(401, {"error": {"message": f"Incorrect key: {self.headers.get('Authorization')}"}}, {})
        if status != 200:
            echo = {"error": {"message": f"no, {self.headers.get('Authorization')}"}}  # some repeat the key
            return self.answer(status, echo, headers)
        if text is None:
            material = body["messages"][1]["content"]
            text = judge.decide(
                *(re.search(PART.format(name=n), material, re.DOTALL)[1] for n in ("reply A", "reply B"))
            )
        self.answer(200, {
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }, {})  # fmt: skip

    def answer(self, status: int, value: dict, headers: dict):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)
