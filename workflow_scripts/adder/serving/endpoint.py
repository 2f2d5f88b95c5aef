"""An OpenAI-compatible endpoint on this machine, by transformers' own server: `adder serve`."""

import contextlib
import socket
from pathlib import Path

from adder.core import hardware, precision
from adder.core.errors import UserError


def serve(folder: Path, host: str, port: int) -> None:
    """Serve the model directory `folder` until Ctrl-C. Raises UserError where nothing can listen at host and port."""
    _refuse_taken(host, port)
    from transformers.cli.serve import Serve  # typed loosely, and slow to import

    device = hardware.device("auto")
    dtype = precision.compute_dtype(device).value
    # The server knows a model by its path, and refuses requests that name another: so the name is a short one.
    with contextlib.chdir(folder.resolve().parent):
        Serve(force_model=folder.resolve().name, device=device, dtype=dtype, host=host, port=port)


def _refuse_taken(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(
            f"nothing can listen at {host}:{port}: {error.strerror}; name another --port or --host"
        ) from None


def how_to_ask(folder: Path, host: str, port: int, system_prompt: str | None) -> str:
    """What a person needs to talk to the endpoint."""
    first = f"\nSend the system prompt of the training first: {system_prompt!r}" if system_prompt else ""
    name = folder.resolve().name
    return (
        f"{folder} at http://{host}:{port}/v1 as the model {name!r}, by OpenAI's interface; Ctrl-C ends it.{first}\n"
        f"curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '"
        '{"temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}\''
    )
