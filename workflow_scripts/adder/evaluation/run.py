"""Measure one model on the held-out rows: loss and perplexity, replies and their scores. Base and merged alike."""

import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adder.core import hardware, intervals, precision
from adder.core.choice import Choice
from adder.core.errors import UserError
from adder.core.files import read_json, write_json, write_jsonl
from adder.core.progress import Progress
from adder.evaluation import generation as replies
from adder.evaluation import metrics as scoring
from adder.evaluation import speculative_decoding
from adder.evaluation.heldout_loss import row_losses
from adder.evaluation.json_fields import compare_fields, field_table
from adder.evaluation.max_new_tokens import choose_max_new_tokens
from adder.evaluation.reference_forms import parse_object
from adder.tokenization.chat_template import ChatTemplate
from adder.tokenization.token_table import TokenTable

LARGEST_BATCH = 128  # replies at once: beyond it a CPU computes no faster
SUMMARY = ("loss", "perplexity", "exact_match")
CACHE_SHARE = 0.5  # of the free memory that keys and values of one batch may take


def run(settings: dict, inputs: dict[str, Path], out: Path, progress: Progress) -> dict:
    """Evaluate `inputs["model"]/model` on the held-out rows; write scores.json and samples.jsonl into `out`.

    Raises UserError when there are no held-out rows, when a metric doesn't suit them, or when vLLM is asked for and
    can't run.
    """
    hardware.use_threads()
    device = hardware.device()
    backend = replies.choose_backend(settings["backend"], device)
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer", local_files_only=True)
    rows = load_rows(inputs, settings["max_samples"], tokenizer)
    metrics = scoring.choose_metrics([row["reference"] for row in rows if row["prompt"]], settings["metrics"])
    dtype = precision.compute_dtype(device)
    # Only the stage that fetches the base says where a model comes from.
    which = "base" if (inputs["model"] / "source.json").exists() else "tuned"
    progress.say(f"loading the {which} model on {device} in {dtype.value}")
    model = load_model(inputs["model"] / "model", dtype.value, device)
    about = {"architecture": type(model).__name__, "parameters": model.num_parameters()}
    details = read_json(inputs["tokenize"] / "tokenize.json")
    losses, written, generation = measure(
        model, tokenizer, rows, details, settings, backend.value, metrics.value, progress
    )
    kind = scoring.kind_of(metrics.value)
    samples = [make_sample(row, loss, written.get(row["id"]), kind) for row, loss in zip(rows, losses, strict=True)]
    scores = {
        "model": about,
        "kind": kind,
        "metrics": metrics.to_dict(),
        "backend": backend.to_dict(),
        "heldout": summarise(samples),
        "compute_dtype": dtype.to_dict(),
        "lm_eval_version": version("lm_eval"),
        **generation,
    }
    write_json(out / "scores.json", scores)
    write_jsonl(out / "samples.jsonl", samples)
    summary = {name: scores["heldout"][name]["value"] for name in SUMMARY if name in scores["heldout"]}
    progress.say(f"the {which} model: {', '.join(in_words(*item) for item in summary.items())}")
    return summary


def in_words(name: str, value: float) -> str:
    """A score for the terminal, as `exact match 89.5 %` and `loss 0.0122`."""
    return f"{name.replace('_', ' ')} {f'{100 * value:.1f} %' if name == 'exact_match' else f'{value:.3g}'}"


def load_rows(inputs: dict[str, Path], most: int | None, tokenizer) -> list[dict]:
    """The held-out rows as {id, prompt, prompt_text, prompt_ids, reference, input_ids, labels}, at most `most` of them;
    and `group`, where data.heldout.group_by made such.

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
    found = _conversations(inputs["format"] / "heldout.parquet", {row["id"] for row in rows})
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    for row in rows:
        text, group = found[row["id"]]
        row |= {**group, **_question(json.loads(text), row, tokenizer, template)}
    return rows


def _conversations(path: Path, wanted: set[str]) -> dict[str, tuple[str, dict]]:
    """Some conversations by id: their JSON, and {group}, or {} where rows belong to none."""
    found = {}
    with pq.ParquetFile(path) as file:
        columns = [name for name in ("id", "conversation", "group") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                if (name := row.pop("id")) in wanted:
                    found[name] = (row.pop("conversation"), row)
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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return model.to(device).eval()


@dataclass(frozen=True)
class Plan:
    """How the replies are written, each of `requests` one; `stop` is the text of the end-of-turn token."""

    limit: Choice
    batch_size: Choice
    context: int
    stop: str
    stop_ids: list[int]
    requests: list[speculative_decoding.Request]


def measure(
    model: PreTrainedModel,
    tokenizer,
    rows: list[dict],
    details: dict,
    settings: dict,
    backend: str,
    metrics: list[str],
    progress: Progress,
) -> tuple[list[torch.Tensor], dict[str, dict], dict]:
    """Each row's losses; {id: reply, its counts and scores} for each that has a prompt; what scores.json says of it.

    The loop of decoding.py gives a row's losses and its reply in one pass, if the prompt is the one that training saw.
    """
    asked = [row for row in rows if row["prompt"]]
    if not asked:
        return row_losses(model, rows, progress), {}, {}
    plan = plan_replies(model, tokenizer, asked, details, settings, progress)
    one_pass = backend == "hf" and speculative_decoding.supports(model)
    shared = {row["id"] for row, request in zip(asked, plan.requests, strict=True) if one_pass and request.labels}
    alone = [row for row in rows if row["id"] not in shared]
    losses = dict(zip([row["id"] for row in alone], row_losses(model, alone, progress), strict=True))
    generator = make_generator(model, tokenizer, plan, backend, progress)
    documents = [{"prompt": row["prompt_text"], "reference": row["reference"]} for row in asked]
    start = time.perf_counter()
    found = replies.generate(generator, documents, plan.limit.value, plan.stop, partial(score_reply, metrics))
    seconds = time.perf_counter() - start
    written = {}
    for row, reply, request in zip(asked, found, plan.requests, strict=True):
        written[row["id"]] = {**reply, **generator.written[tuple(request.ids[: request.prompt])]}
    if one_pass:
        own = {row["id"]: values for row, values in zip(asked, generator.losses, strict=True) if row["id"] in shared}
        losses |= {name: values.double().cpu() for name, values in own.items()}
    new_tokens = sum(one["new_tokens"] for one in written.values())
    replies.say_total(len(written), new_tokens, seconds, progress)
    generation = {
        "seconds": round(seconds, 2),
        "new_tokens": new_tokens,
        "truncated": sum(one["truncated"] for one in written.values()),
        "prompts_cut": sum(is_cut(row, plan.limit.value, plan.context) for row in asked),
        "prompts_unlike_training": sum(not is_as_trained(row) for row in asked),
    }
    about = {"max_new_tokens": plan.limit.to_dict(), "batch_size": plan.batch_size.to_dict(), "generation": generation}
    return [losses[row["id"]] for row in rows], written, about


def plan_replies(
    model: PreTrainedModel, tokenizer, asked: list[dict], details: dict, settings: dict, progress: Progress
) -> Plan:
    """Choose how the replies to the rows `asked` are written, and warn of prompts that are odd."""
    context = model.config.get_text_config().max_position_embeddings
    limit = choose_limit(settings["max_new_tokens"], details["reply_tokens"]["train"], context)
    if differ := sum(not is_as_trained(row) for row in asked):
        progress.say(f"warning: {differ} of {len(asked)} prompts aren't those that training used, token for token")
    if cut := sum(is_cut(row, limit.value, context) for row in asked):
        progress.say(f"warning: {cut} of {len(asked)} prompts lose their beginning, to fit the context of {context}")
    longest = max(len(row["prompt_ids"]) for row in asked)
    batch = choose_batch_size(settings["batch_size"], model, len(asked), min(longest + limit.value, context))
    stop = details["end_of_turn"]
    return Plan(
        limit=limit,
        batch_size=batch,
        context=context,
        stop=stop["token"],
        stop_ids=sorted({stop["id"], *eos_ids(model, tokenizer)}),
        requests=[make_request(row, limit.value, context) for row in asked],
    )


def is_as_trained(row: dict) -> bool:
    """Whether the prompt is, token for token, what stood before the last reply in training."""
    return row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]


def is_cut(row: dict, limit: int, context: int) -> bool:
    """Whether the prompt loses its beginning, so that a reply of `limit` tokens fits the context."""
    return len(row["prompt_ids"]) + limit > context


def make_request(row: dict, limit: int, context: int) -> speculative_decoding.Request:
    """The prompt, with the reference as a guess at the reply and with labels where prompt and reference stand so."""
    prompt = row["prompt_ids"][-(context - limit) :]
    if is_as_trained(row) and not is_cut(row, limit, context) and len(row["input_ids"]) <= context:
        return speculative_decoding.Request(row["input_ids"], len(prompt), row["labels"])
    return speculative_decoding.Request(prompt, len(prompt))


def make_generator(model: PreTrainedModel, tokenizer, plan: Plan, backend: str, progress: Progress):
    """The lm-eval model that replies. With "vllm" the model given is emptied: its memory is vLLM's from then on."""
    if backend == "vllm":
        from adder.evaluation.vllm_generation import VllmGenerator  # imports vLLM

        dtype = str(model.dtype).removeprefix("torch.")
        model.to("meta")
        torch.cuda.empty_cache()
        return VllmGenerator(model.name_or_path, tokenizer.name_or_path, dtype, plan.stop_ids, plan.context)
    common = (model, tokenizer, plan.stop_ids, plan.batch_size.value, plan.context)
    if speculative_decoding.supports(model):
        return replies.SlotGenerator(*common, plan.requests, progress)
    return replies.Generator(*common, len(plan.requests), progress)


def score_reply(metrics: list[str], reference: str, reply: str) -> dict[str, float]:
    """Scores of one reply, 0 to 1 each; what stands before the end of its reasoning isn't compared."""
    return scoring.score_reply(metrics, reference, answer(reply))


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


def eos_ids(model: PreTrainedModel, tokenizer) -> set[int]:
    """Ids that end the model's generation by its own configuration, and the one that ends a text for its tokenizer."""
    found = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        own = getattr(config, "eos_token_id", None)
        found |= set(own if isinstance(own, list) else [own])
    return found - {None}


def make_sample(row: dict, losses: torch.Tensor, written: dict | None, kind: str) -> dict:
    """One line of samples.jsonl; `loss` is the row's mean in nats a labelled token. A plain text has no reply."""
    sample = {
        "id": row["id"],
        "prompt": row["prompt"],
        "reference": row["reference"],
        "loss": float(losses.mean()) if len(losses) else 0.0,
        "labelled_tokens": len(losses),
    } | ({"group": row["group"]} if "group" in row else {})
    if written is None:
        return {**sample, "reply": None}
    if kind != "json":
        return {**sample, **written}
    expected, found = parse_object(row["reference"]), parse_object(answer(written["reply"]))
    assert expected is not None  # else the kind were another one
    return {**sample, **written, "fields": compare_fields(expected, found)}


def summarise(samples: list[dict]) -> dict:
    """Each score with its interval: loss and perplexity a token, the rest a reply. Rows of a group count together."""
    asked = [sample for sample in samples if sample["reply"] is not None]
    scores = {}
    for name, score in scoring.SCORES.items():
        rows = samples if isinstance(score, scoring.RatioScore) and not score.of_replies else asked
        clusters = intervals.clusters_of(rows)
        if isinstance(score, scoring.ReplyScore):
            if rows and name in rows[0]:
                average = intervals.proportion if score.zero_or_one else intervals.mean
                scores[name] = average([row[name] for row in rows], clusters)
        elif score.exponential_of:
            scores[name] = intervals.perplexity(scores[score.exponential_of])
        elif rows and (score.form is None or "fields" in rows[0]):
            scores[name] = intervals.ratio(*zip(*map(score.parts, rows), strict=True), clusters)
    if asked and "fields" in asked[0]:
        scores["fields"] = field_table([sample["fields"] for sample in asked])
    return scores
