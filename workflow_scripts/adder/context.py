"""The context length of a model, read from its config.json."""

from pathlib import Path

from adder.files import read_json

# What configurations call the number of positions that a model was made for.
NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")


def context_length(model: Path) -> int | None:
    """Positions that the model in this directory was made for; None where its config.json does not tell."""
    config = read_json(model / "config.json")
    for part in (config, config.get("text_config") or {}):
        for name in NAMES:
            if isinstance(part.get(name), int):
                return part[name]
    return None
