"""The raw SNIPS files (sonos/nlu-benchmark, 2017-06-custom-intent-engines) as text → function call.

A file is {"PlayMusic": [{"data": [{"text": "play "}, {"text": "Yo Ho", "entity": "track"}, …]}, …]}. The user's message
is the joined text; the reply is {"name": intent, "arguments": {slot: value}} as compact JSON. Named in a source as
`convert: config/examples/snips.py`.
"""

import json
from collections.abc import Iterator


def rows(path: str, encoding: str) -> Iterator[dict]:
    """Yield {"messages": [user, assistant]} for each request in one raw file."""
    with open(path, encoding=encoding) as file:
        intents = json.load(file)
    for intent, requests in intents.items():
        for request in requests:
            chunks = request["data"]
            arguments: dict[str, str | list[str]] = {}
            for chunk in chunks:
                if "entity" in chunk:
                    add(arguments, chunk["entity"], chunk["text"].strip())
            call = json.dumps({"name": intent, "arguments": arguments}, ensure_ascii=False)
            text = "".join(chunk["text"] for chunk in chunks).strip()
            yield {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": call}]}


def add(arguments: dict[str, str | list[str]], slot: str, value: str) -> None:
    """Set a slot; one that occurs twice in a request holds the list of its values, in order."""
    if slot not in arguments:
        arguments[slot] = value
    elif isinstance(arguments[slot], list):
        arguments[slot].append(value)
    else:
        arguments[slot] = [arguments[slot], value]
