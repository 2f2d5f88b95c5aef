"""One greedy reply of a model directory, by a process that knows nothing but that directory.

`python -m adder.merging.fresh_process_reply FOLDER DTYPE DEVICE` reads {"input_ids": …, "max_new_tokens": …} as JSON
from standard input and writes {"input_ids": the reply's, "text": …} as the last line of its output. DEVICE "auto"
spreads a model over GPU, memory and disk.
"""

import json
import sys
import tempfile
from typing import Any, TypedDict

import torch
from transformers import AutoTokenizer, GenerationConfig

from adder.core import text_model


class GreedyReply(TypedDict):
    """New token ids, the ending one included, and their text."""

    input_ids: list[int]
    text: str


def greedy_reply(folder: str, dtype: str, device: str, input_ids: list[int], max_new_tokens: int) -> GreedyReply:
    """Load model and tokenizer from `folder`; return the reply to prompt `input_ids`, up to an end that it names."""
    with tempfile.TemporaryDirectory() as offload:
        place: dict[str, Any] = {"device_map": {"": device}}
        if device == "auto":
            place = {"device_map": "auto", "offload_folder": offload}
        model: Any = text_model.load(folder, dtype=getattr(torch, dtype), **place)
        own = model.generation_config
        # Neither sampling nor penalties, whatever the model's own configuration asks for.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        prompt = torch.tensor([input_ids], device=model.device)
        ids = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt))[0, len(input_ids) :].tolist()
    return {"input_ids": ids, "text": AutoTokenizer.from_pretrained(folder, local_files_only=True).decode(ids)}


def main() -> None:
    """Reply to the question on standard input."""
    folder, dtype, device = sys.argv[1:]
    question = json.load(sys.stdin)
    print(json.dumps(greedy_reply(folder, dtype, device, question["input_ids"], question["max_new_tokens"])))


if __name__ == "__main__":
    main()
