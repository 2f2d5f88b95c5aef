"""What a row's reply is known by: a hash, and whether it stands in the row's own prompt."""

import json
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from adder.formatting.conversation import Conversation
from adder.formatting.similarity.words import folded

Hashes = npt.NDArray[np.uint64]
ANSWERED = np.uint64(1)  # the lowest bit of a reply's key: it stands in its own prompt


def reply_text(conversation: Conversation) -> str:
    """What the last reply says, calls of tools included; "" for a plain text and for a prompt alone."""
    for message in reversed(conversation.get("messages", [])):
        if message["role"] == "assistant":
            calls = message.get("tool_calls")
            return (message.get("content") or "") + (json.dumps(calls, sort_keys=True) if calls else "")
    return ""


def reply_key(conversation: Conversation) -> bytes:
    """Eight bytes, a little-endian number: of equal replies but for case and spacing equal in all bits but the lowest,
    which tells whether the reply stands in its own prompt; zeros for an empty one.
    """
    reply = reply_text(conversation)
    text = " ".join(folded(reply).split()).encode()
    if not text:
        return bytes(8)
    key = bytearray(blake2b(text, digest_size=8).digest())
    key[0] = (key[0] & 0xFE) | holds_its_reply(conversation, reply)
    return bytes(key)


def joined(keys: Sequence[bytes]) -> Hashes:
    """Keys as numbers, uint64 (n,)."""
    return np.frombuffer(b"".join(keys), dtype="<u8")


def holds_its_reply(conversation: Conversation, reply: str) -> bool:
    """Whether the last reply stands, as whole words, in what was said before it, but for case."""
    part, messages = reply.strip().casefold(), conversation.get("messages", [])
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    before = messages[: said[-1]] if said else []
    return bool(part) and any(
        _stands(part, (one.get("content") or "").casefold()) for one in before if one["role"] != "assistant"
    )


def _stands(part: str, text: str) -> bool:
    start = text.find(part)
    while start >= 0:
        before, after = text[start - 1 : start] if start else "", text[start + len(part) : start + len(part) + 1]
        if not (before.isalnum() and part[0].isalnum()) and not (after.isalnum() and part[-1].isalnum()):
            return True
        start = text.find(part, start + 1)
    return False
