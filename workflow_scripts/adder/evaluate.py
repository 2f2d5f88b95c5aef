"""Measure one model on the held-out rows: loss and perplexity, replies and their scores. Base and merged alike."""

import hashlib
import json
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adder import hardware, replies, scoring, statistics
from adder.choice import Choice
from adder.errors import UserError
from adder.files import read_json, write_json, write_jsonl
from adder.forward import labelled_logits
from adder.loss import has_plain_head, labelled_losses
from adder.progress import Progress
from adder.reply_length import choose_max_new_tokens
from adder.template import ChatTemplate
from adder.tokens import TokenTable

IGNORED = -100
LOSS_TOKENS = 4096  # positions of one batch of the loss, padding included
LARGEST_BATCH = 128  # replies at once: beyond it a CPU computes no faster, and each step waits for the longest reply
SUMMARY = ("loss", "perplexity", "exact_match")
CACHE_SHARE = 0.5  # of the free memory that keys and values of one batch may take


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Evaluate `inputs["model"]/model` on the held-out rows; write scores.json and samples.jsonl into `out`.

    Raises UserError when there are no held-out rows, or when the model and the tokenizer don't belong together.
    """
    hardware.use_threads()
    device = hardware.device()
    details = read_json(inputs["tokenize"] / "tokenize.json")
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    rows = load_rows(inputs, settings["max_samples"], tokenizer)
    dtype = hardware.compute_dtype(device)
    progress.say(f"loading the model on {device} in {dtype.value}")
    model = load_model(inputs["model"] / "model", dtype.value, device)
    losses = row_losses(model, rows, progress)
    asked = [row for row in rows if row["prompt"]]
    kind = scoring.choose_kind([row["reference"] for row in asked])
    written, generation = {}, {}
    if asked:
        written, generation = write_replies(model, tokenizer, asked, details, settings, kind, progress)
    samples = [make_sample(row, loss, written.get(row["id"]), kind) for row, loss in zip(rows, losses, strict=True)]
    scores = {
        "model": {"architecture": type(model).__name__, "parameters": model.num_parameters()},
        "kind": kind,
        "heldout": summarise(samples),
        "compute_dtype": dtype.to_dict(),
        "lm_eval_version": version("lm_eval"),
        **generation,
    }
    write_json(out / "scores.json", scores)
    write_jsonl(out / "samples.jsonl", samples)
    return {name: score["value"] for name, score in scores["heldout"].items() if name in SUMMARY}


def load_rows(inputs: dict[str, Path], most: int | None, tokenizer) -> list[dict]:
    """The held-out rows as {id, prompt, prompt_text, prompt_ids, reference, input_ids, labels}, at most `most` of them.

    A sample is the rows with the smallest digests of their ids: rows that are added later displace few. The prompt is
    all that stands before the last reply, as messages, as the text that the template makes of them, and as its ids; a
    plain text has none, and is its own reference. Raises UserError when no row was held out.
    """
    table = TokenTable(inputs["tokenize"] / "heldout.arrow")
    numbers = range(len(table))
    if not len(table):
        raise UserError("data.heldout: no row is held out, so there is nothing to evaluate on; set its share or size")
    if most is not None and most < len(table):
        digests = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in table.ids(numbers)]
        numbers = sorted(sorted(numbers, key=lambda number: digests[number])[:most])
    rows = [table.row(number) for number in numbers]
    texts = _conversations(inputs["format"] / "heldout.parquet", {row["id"] for row in rows})
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    return [{**row, **_question(json.loads(texts[row["id"]]), row, tokenizer, template)} for row in rows]


def _conversations(path: Path, wanted: set[str]) -> dict[str, str]:
    """The JSON of some conversations by id."""
    found = {}
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["id", "conversation"]):
            pairs = zip(batch.column("id").to_pylist(), batch.column("conversation").to_pylist(), strict=True)
            found |= {name: text for name, text in pairs if name in wanted}
    return found


def _question(conversation: dict, row: dict, tokenizer, template: ChatTemplate | None) -> dict:
    """What the model is asked, and the reply that it should give."""
    if "text" in conversation:
        return {"prompt": [], "reference": conversation["text"]}
    turns = conversation["messages"]
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    text = template.render(turns[:last], prompt=True, tools=conversation.get("tools"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    reference = turns[last]["content"]
    if turns[last].get("tool_calls"):  # as the template writes them
        reference = tokenizer.decode(row["input_ids"][len(ids) :], skip_special_tokens=True).strip()
    return {"prompt": turns[:last], "prompt_text": text, "prompt_ids": ids, "reference": reference}


def load_model(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a model to be evaluated: weights in `dtype`, on `device`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device).eval()


@torch.inference_mode()
def row_losses(model: PreTrainedModel, rows: list[dict], progress: Progress) -> list[torch.Tensor]:
    """Loss in nats at each labelled position of each row, fp64 on the CPU; a row longer than the context is cut."""
    context = model.config.get_text_config().max_position_embeddings
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]["input_ids"]), index))
    losses: list[torch.Tensor] = [torch.zeros(0)] * len(rows)
    done = 0
    plain = has_plain_head(model)
    for batch in loss_batches(order, rows, context) if plain else [[index] for index in order]:
        examples = [(rows[index]["input_ids"][:context], rows[index]["labels"][:context]) for index in batch]
        found = padded_losses(model, examples) if plain else [whole_head_losses(model, *examples[0])]
        for index, values in zip(batch, found, strict=True):
            losses[index] = values.double().cpu()
        done += len(batch)
        progress.line(f"loss: {done:,} of {len(rows):,} rows", last=done == len(rows))
    return losses


def loss_batches(order: list[int], rows: list[dict], context: int) -> list[list[int]]:
    """Rows, longest first, in batches of at most LOSS_TOKENS positions: neighbours are alike, so little is padding."""
    batches: list[list[int]] = []
    for index in order:
        width = min(len(rows[batches[-1][0]]["input_ids"]), context) if batches else 0
        if not batches or (len(batches[-1]) + 1) * width > LOSS_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def padded_losses(model: PreTrainedModel, examples: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Losses of several examples (ids, labels) in one padded batch; the LM head sees labelled positions only."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for number, (own_ids, own_labels) in enumerate(examples):
        ids[number, : len(own_ids)] = torch.tensor(own_ids)
        labels[number, : len(own_ids)] = torch.tensor(own_labels)
        mask[number, : len(own_ids)] = 1
    counts = (labels[:, 1:] != IGNORED).sum(dim=1).tolist()
    device = model.device
    losses = labelled_losses(model, labels.to(device), input_ids=ids.to(device), attention_mask=mask.to(device))
    return list(losses.split(counts))


def whole_head_losses(model: PreTrainedModel, ids: list[int], labels: list[int]) -> torch.Tensor:
    """Losses of one example for models that scale or cap the LM head's output: from the model's own logits."""
    logits, target = labelled_logits(model, ids, labels)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


def write_replies(model, tokenizer, rows: list[dict], details: dict, settings: dict, kind: str, progress: Progress):
    """Let the model reply to each prompt: {id: {reply, new_tokens, truncated}} and what scores.json says of it."""
    documents = [{"prompt": row["prompt_text"], "reference": row["reference"]} for row in rows]
    prompt_ids = [row["prompt_ids"] for row in rows]
    differ = sum(row["input_ids"][: len(row["prompt_ids"])] != row["prompt_ids"] for row in rows)
    if differ:
        progress.say(f"warning: {differ} of {len(rows)} prompts aren't those that training used, token for token")
    context = model.config.get_text_config().max_position_embeddings
    longest = max(map(len, prompt_ids))
    limit = choose_limit(settings["max_new_tokens"], details["reply_tokens"]["train"], context)
    cut = sum(len(ids) + limit.value > context for ids in prompt_ids)
    if cut:
        progress.say(f"warning: {cut} of {len(rows)} prompts lose their beginning, to fit the context of {context}")
    batch = choose_batch_size(settings["batch_size"], model, len(rows), min(longest + limit.value, context))
    stop = details["end_of_turn"]
    stop_ids = sorted({stop["id"], *eos_ids(model)})
    generator = replies.Generator(model, tokenizer, stop_ids, batch.value, context, len(rows), progress)

    def score(reference: str, reply: str) -> dict[str, float]:
        scores = scoring.score(kind, reference, answer(reply))
        return {name: value for name, value in scores.items() if name != "fields"}

    start = time.perf_counter()
    texts, _ = replies.generate(generator, documents, limit.value, stop["token"], score)
    seconds = time.perf_counter() - start
    replies.say_total(generator, seconds, progress)
    written = {
        row["id"]: {"reply": text, **generator.written[tuple(ids[-(context - limit.value) :])]}
        for row, text, ids in zip(rows, texts, prompt_ids, strict=True)
    }
    generation = {
        "seconds": round(seconds, 2),
        "new_tokens": sum(one["new_tokens"] for one in written.values()),
        "truncated": sum(one["truncated"] for one in written.values()),
        "prompts_cut": cut,
        "prompts_unlike_training": differ,
    }
    return written, {"max_new_tokens": limit.to_dict(), "batch_size": batch.to_dict(), "generation": generation}


def answer(reply: str) -> str:
    """A reply without the reasoning before it, which is not what is compared."""
    return reply.rpartition("</think>")[2].strip() if "</think>" in reply else reply


def choose_limit(wanted: str | int, reply_tokens: dict, context: int) -> Choice:
    """Most new tokens of a reply: as set, or from the training replies' lengths. Half the context stays for prompts."""
    choice = Choice(wanted, "as set") if wanted != "auto" else choose_max_new_tokens(reply_tokens, context)
    half = max(1, context // 2)
    if choice.value <= half:
        return choice
    return Choice(half, f"{half} tokens, half of the model's context: the prompt needs room as well ({choice.reason})")


def choose_batch_size(wanted: str | int, model: PreTrainedModel, rows: int, tokens: int) -> Choice:
    """Replies generated at once: as set, or as many as help and fit, spread evenly. `tokens`: prompt and reply."""
    if wanted != "auto":
        return Choice(wanted, "as set")
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_reply = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    fit = int(CACHE_SHARE * hardware.free_memory(model.device.type)) // per_reply
    most = max(1, min(LARGEST_BATCH, fit))
    value = -(-rows // -(-rows // most))
    enough = fit >= LARGEST_BATCH
    why = f"more than {LARGEST_BATCH} gain nothing" if enough else f"keys and values of {fit} fit in memory"
    return Choice(value, f"{rows} replies in even batches; {why}")


def eos_ids(model: PreTrainedModel) -> list[int]:
    """Ids that end the model's generation by its own configuration."""
    for config in (model.generation_config, model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def make_sample(row: dict, losses: torch.Tensor, written: dict | None, kind: str) -> dict:
    """One line of samples.jsonl; `loss` is the row's mean in nats a labelled token. A plain text has no reply."""
    sample = {
        "id": row["id"],
        "prompt": row["prompt"],
        "reference": row["reference"],
        "loss": float(losses.mean()) if len(losses) else 0.0,
        "labelled_tokens": len(losses),
    }
    if written is None:
        return {**sample, "reply": None}
    return {**sample, **written, **scoring.score(kind, row["reference"], answer(written["reply"]))}


def summarise(samples: list[dict]) -> dict:
    """Each score with its interval: loss and perplexity a token, the rest a reply."""
    tokens = [sample["labelled_tokens"] for sample in samples]
    loss = statistics.ratio([sample["loss"] * sample["labelled_tokens"] for sample in samples], tokens)
    scores = {"loss": loss, "perplexity": statistics.perplexity(loss)}
    asked = [sample for sample in samples if sample["reply"] is not None]
    for name in ("exact_match", "json_valid"):
        if asked and name in asked[0]:
            scores[name] = statistics.proportion(sum(sample[name] for sample in asked), len(asked))
    if asked and "fields" in asked[0]:
        fields = [sample["fields"] for sample in asked]
        counts = [scoring.count_fields(one) for one in fields]
        scores["field_f1"] = statistics.ratio(
            [2 * right for right, _, _ in counts], [found + expected for _, found, expected in counts]
        )
        scores["fields"] = scoring.field_table(fields)
    return scores
