"""`adder serve` and `adder chat` as they are run: a real server, asked by OpenAI's client, says what the chat says."""

import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from adder.core.display.text import printable
from adder.core.errors import UserError
from adder.serving import endpoint
from tiny import save_tiny_model

ADDER = [sys.executable, "-m", "adder.workflow.cli"]
QUESTION = "Where is the parcel?"


@pytest.fixture
def port():
    with socket.create_server(("localhost", 0)) as taken:
        number = taken.getsockname()[1]
    return number


def test_the_endpoint_replies_as_the_chat_does(port, tmp_path):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=False, initializer_range=0.3)
    chat = subprocess.run(
        [*ADDER, "chat", str(folder), "--max-new-tokens", "10"],
        input=QUESTION + "\n", capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([*ADDER, "serve", str(folder), "--port", str(port)], stdout=log, stderr=log)
    try:
        wait_for(port, server)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        messages: list = [{"role": "user", "content": QUESTION}]
        asked = {"model": folder.name, "messages": messages, "temperature": 0, "max_tokens": 10}
        reply = client.chat.completions.create(**asked).choices[0].message.content
        parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)]
    finally:
        server.terminate()
        server.wait(60)
    assert reply == "".join(parts)
    assert chat.stdout == f"{printable(reply)} [cut at 10 tokens]\n"


def wait_for(port, server):
    for _ in range(600):
        assert server.poll() is None
        try:
            if httpx.get(f"http://localhost:{port}/health").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail("the server didn't come up")


def test_a_port_that_is_taken_is_refused(tmp_path):
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(UserError, match="name another --port"):
        endpoint.serve(tmp_path, "localhost", taken.getsockname()[1])


def test_what_a_person_needs_is_said(tmp_path):
    text = endpoint.how_to_ask(tmp_path, "localhost", 8000, "Be brief.")
    assert "http://localhost:8000/v1" in text
    assert "'Be brief.'" in text
