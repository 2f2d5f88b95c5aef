"""The README of a merged model: what it was made from and how, in the hub's format (YAML front matter, Markdown)."""

from pathlib import Path

import yaml

from adder.files import read_json


def write_model_card(path: Path, inputs: dict[str, Path]) -> None:
    """Write the model card from the stages' own records: model (`source.json`), train (adapter), tokenize."""
    source = read_json(inputs["model"] / "source.json") if (inputs["model"] / "source.json").exists() else {}
    adapter_config = inputs["train"] / "adapter" / "adapter_config.json"
    adapter = read_json(adapter_config) if adapter_config.exists() else None
    path.write_text(model_card(source, adapter, read_json(inputs["tokenize"] / "tokenize.json")), encoding="utf-8")


def model_card(source: dict, adapter: dict | None, tokenize: dict) -> str:
    """The card's text. `adapter`: PEFT's configuration, None after a full training."""
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["adder", "conversational"]}
    if source.get("kind") == "hub":
        head["base_model"] = source["source"]
    if source.get("license"):
        head["license"] = str(source["license"]).lower()
    if adapter:
        head["tags"] = sorted([*head["tags"], "lora"])
    facts = [
        ("Base model", f"{source.get('source', 'unknown')}" + _revision(source)),
        ("Licence of the base", source.get("license") or "not stated: see the base model"),
        ("Method", _method(adapter)),
        ("Training conversations", f"{tokenize['counts']['train']['examples']:,}"),
        ("Tokens learnt from", f"{tokenize['counts']['train']['labelled']:,}"),
        ("End of turn", f"`{tokenize['end_of_turn']['token']}`"),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""---
{yaml.safe_dump(head, sort_keys=True).strip()}
---

# A fine-tuned language model

Made with Adder from the base model below. It is used with its chat template, which is part of the tokenizer.

| | |
|---|---|
{lines}

```python
from transformers import pipeline

chat = pipeline("text-generation", model="path/to/this/folder")
print(chat([{{"role": "user", "content": "Hello"}}], max_new_tokens=200)[0]["generated_text"][-1]["content"])
```
"""


def _method(adapter: dict | None) -> str:
    if adapter is None:
        return "training of all weights"
    kind = "DoRA" if adapter.get("use_dora") else "LoRA"
    wanted = adapter["target_modules"]
    # A pattern as it is; of full names, which some starts of LoRA lead to, the last parts.
    modules = f"`{wanted}`" if isinstance(wanted, str) else ", ".join(sorted({n.rpartition(".")[2] for n in wanted}))
    scale = f"alpha {adapter['lora_alpha']:g}{', rank-stabilised' if adapter.get('use_rslora') else ''}"
    whole = sorted({name.rpartition(".")[2] for name in adapter.get("modules_to_save") or ()})
    beside = f"; {', '.join(whole)} trained whole" if whole else ""
    return f"{kind} of rank {adapter['r']}, {scale}, on {modules}{beside}; merged into the base's weights"


def _revision(source: dict) -> str:
    return f", revision `{source['revision']}`" if source.get("revision") else ""
