"""Tiny models with random weights and a tokenizer of their own: real files for the real loading path."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "My order 48213 has not arrived, where is the parcel?",
    "Please refund 19.99 for the kettle that I bought on 3 May.",
    '{"intent": "refund", "order": "48213", "amount": 19.99, "urgent": false, "date": null}',
    "What is two plus two? It is four. The capital of France is Paris.",
]


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 600 tokens; pad and end are both <|im_end|>, as in SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    fast.model_max_length = 512
    return fast


def save_tiny_model(folder: Path, seed: int = 0, chat_template: str | None = CHATML, **config) -> Path:
    """Save a two-layer Llama (hidden 64, 4 heads over 2 key-value heads, tied embeddings) and its tokenizer."""
    tokenizer = tiny_tokenizer(chat_template)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_row(number: int, length: int, vocabulary: int = 300) -> dict:
    """An example of `length` made-up tokens, whose second half carries loss."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
    half = length // 2
    return {"id": f"rows:{number}", "input_ids": ids, "labels": [-100] * half + ids[half:]}


def pack_rows(packs: list[list[dict]]) -> list[dict]:
    """Packs as the lengths stage writes them, from lists of examples."""
    return [
        {
            "input_ids": [token for row in pack for token in row["input_ids"]],
            "labels": [label for row in pack for label in [-100, *row["labels"][1:]]],
            "seq_lengths": [len(row["input_ids"]) for row in pack],
        }
        for pack in packs
    ]


def write_training_inputs(folder: Path, model_dir: Path, packs: int = 12) -> dict[str, Path]:
    """The parents of a train stage, small: `packs` packs of three examples and eight held-out examples."""
    import shutil

    import pyarrow as pa

    from adder.core.files import write_json, write_table

    inputs = {name: folder / name for name in ("model", "tokenize", "lengths", "format")}
    for path in inputs.values():
        path.mkdir(parents=True)
    shutil.copytree(model_dir, inputs["model"] / "model")
    write_json(inputs["model"] / "source.json", {"source": "tiny", "revision": None})
    tiny_tokenizer().save_pretrained(inputs["tokenize"] / "tokenizer")
    rows = [token_row(100 + i, 10 + (7 * (i // 3) + i % 3) % 17) for i in range(3 * packs)]
    write_tokens(inputs["tokenize"] / "train.arrow", rows)
    lengths = [len(row["input_ids"]) for row in rows]
    table = {
        "rows": [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(packs)],
        "starts": [[0, 0, 0]] * packs,
        "seq_lengths": [lengths[3 * i : 3 * i + 3] for i in range(packs)],
    }
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in table])
    write_table(inputs["lengths"] / "packs.parquet", pa.table(table, schema=schema))
    heldout = [token_row(10_000 + i, 12 + i) for i in range(8)]
    write_tokens(inputs["tokenize"] / "heldout.arrow", heldout)
    write_table(inputs["format"] / "heldout.parquet", pa.table({"id": [row["id"] for row in heldout]}))
    return inputs


def write_tokens(path: Path, rows: list[dict]) -> None:
    """Write a token table from {id, input_ids, labels[, digest]} rows; the counts are made here."""
    import pyarrow as pa

    from adder.tokenization.token_table import SCHEMA

    full = [
        {
            "digest": number,
            **row,
            "tokens": len(row["input_ids"]),
            "labelled": sum(label != -100 for label in row["labels"][1:]),
        }
        for number, row in enumerate(rows)
    ]
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(full, schema=SCHEMA), max_chunksize=5)


def write_conversations(path: Path, rows: list[dict]) -> None:
    """Write conversations as the format stage does, from {id, messages[, tools]} or {id, text} rows."""
    import json

    import pyarrow as pa

    from adder.core.files import write_table

    table = {
        "id": [row["id"] for row in rows],
        "source": [row["id"].partition(":")[0] for row in rows],
        "conversation": [json.dumps({name: value for name, value in row.items() if name != "id"}) for row in rows],
        "digest": list(range(len(rows))),
    }
    write_table(path, pa.table(table))
