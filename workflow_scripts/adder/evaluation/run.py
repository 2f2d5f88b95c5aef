"""Measure one model on the held-out rows: loss and perplexity, replies and their scores. Base and merged alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Never, NotRequired, TypedDict, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from adder.core import hardware, intervals, precision
from adder.core.choice import Choice
from adder.core.files import read_json, write_json, write_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.evaluation import generation, metrics, speculative_decoding
from adder.evaluation.degenerate_replies import faults_of
from adder.evaluation.degenerate_replies import in_words as faults_in_words
from adder.evaluation.heldout_loss import row_losses
from adder.evaluation.heldout_rows import HeldoutRow, load_rows
from adder.evaluation.json_fields import compare_fields, field_table
from adder.evaluation.max_new_tokens import MaxNewTokens, choose_max_new_tokens
from adder.evaluation.model_loading import choose_batch_size, context_length, eos_ids, load_model, try_kernels
from adder.evaluation.records import GenerationFacts, SampleRecord, ScoresRecord
from adder.evaluation.reference_forms import parse_object
from adder.evaluation.reply_text import ReplyReader
from adder.evaluation.stage import EvaluateSettings
from adder.tokenization.records import TokenizeRecord

SUMMARY = ("loss", "perplexity", "exact_match")
LEAST_FAULTY = 0.05  # of the replies: fewer that are cut off, empty or repeat happen to a good model


@dataclass(frozen=True)
class EvaluateInputs:
    """Folders of the stages that are read; model: the base's, or the merged one's."""

    model: Path
    tokenize: Path
    format: Path


class EvaluateSummary(TypedDict):
    """A few figures for the stage's record."""

    loss: float
    perplexity: float
    exact_match: NotRequired[float]


class CountedReply(generation.ScoredReply, generation.ReplyCounts):
    """A reply with its scores and counts."""


@dataclass(frozen=True)
class ReplyPlan:
    """How the replies are written, each of `requests` one; `stop` is the text of the end-of-turn token."""

    limit: MaxNewTokens
    batch_size: Choice[int, Never]
    context: int
    stop: str
    stop_ids: list[int]
    requests: list[speculative_decoding.Request]


@dataclass
class Measured:
    """Each row's losses (nats, fp64, on the CPU), in order; the reply to each that has a prompt, by id."""

    losses: list[torch.Tensor]
    replies: dict[str, CountedReply] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)  # what is compared of the replies
    plan: ReplyPlan | None = None
    facts: GenerationFacts | None = None


def run(settings: EvaluateSettings, inputs: EvaluateInputs, out: Path, context: Context) -> EvaluateSummary:
    """Evaluate `inputs.model`/model on the held-out rows; write scores.json and samples.jsonl into `out`.

    Raises UserError when there are no held-out rows, when a metric doesn't suit them, or when vLLM is asked for and
    can't run.
    """
    hardware.use_threads(context.threads)
    device, progress = context.device, context.progress
    backend = generation.choose_backend(settings.backend, device)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        inputs.tokenize / "tokenizer", local_files_only=True
    )
    reader = ReplyReader(tokenizer)
    rows = load_rows(
        inputs.tokenize / "heldout.arrow", inputs.format / "heldout.parquet", settings.max_samples, tokenizer, reader
    )
    chosen = metrics.choose_metrics([row.reference for row in rows if row.prompt], settings.metrics)
    dtype = precision.compute_dtype(device)
    # Only the stage that fetches the base says where a model comes from.
    which = "base" if (inputs.model / "source.json").exists() else "tuned"
    progress.say(f"loading the {which} model on {device} in {dtype.value}")
    kernels = try_kernels(inputs.model / "model", dtype.value, context)
    model = load_model(inputs.model / "model", dtype.value, device)
    architecture, parameters = type(model).__name__, model.num_parameters()
    details: TokenizeRecord = read_json(inputs.tokenize / "tokenize.json")
    measured = measure(model, reader, rows, details, settings, backend.value, chosen.value, progress)
    kind = metrics.kind_of(chosen.value)
    samples = [
        make_sample(row, losses, measured.replies.get(row.id), kind, measured.answers.get(row.id))
        for row, losses in zip(rows, measured.losses, strict=True)
    ]
    scores: ScoresRecord = {
        "model": {"architecture": architecture, "parameters": parameters},
        "kind": kind,
        "metrics": chosen.to_dict(),
        "backend": backend.to_dict(),
        "heldout": summarise(samples),
        "compute_dtype": dtype.to_dict(),
        "lm_eval_version": version("lm_eval"),
    }
    if kernels is not None:
        scores["kernels"] = kernels.to_dict()
    if measured.plan is not None and measured.facts is not None:
        scores["max_new_tokens"] = measured.plan.limit.to_dict()
        scores["batch_size"] = measured.plan.batch_size.to_dict()
        scores["generation"] = measured.facts
    write_json(out / "scores.json", scores)
    write_jsonl(out / "samples.jsonl", samples)
    summary = {name: scores["heldout"][name]["value"] for name in SUMMARY if name in scores["heldout"]}
    shown = summarised(scores["heldout"], kind)
    say_faults(samples, which, progress)
    progress.say(f"the {which} model: {', '.join(in_words(*item) for item in shown.items())}")
    return cast(EvaluateSummary, summary)


def summarised(heldout: Mapping[str, Any], kind: str) -> dict[str, float]:
    """The scores that the terminal shows: of free text, of which hardly a reply is word for word its reference, those
    that go by words and letters too, and exact matches only where there are any.
    """
    text = [name for name, score in metrics.SCORES.items() if isinstance(score, metrics.ReplyScore) and score.auto]
    names = [*SUMMARY, *(text if kind == "text" else ())]
    found = {name: heldout[name]["value"] for name in names if name in heldout}
    if not found.get("exact_match") and any(name in found for name in text):
        found.pop("exact_match", None)
    return found


def say_faults(samples: Sequence[SampleRecord], which: str, progress: Progress) -> None:
    """Warn of replies that are none, whatever the loss."""
    for line in faults_in_words(faults_of(samples), LEAST_FAULTY):
        progress.say(f"warning: the {which} model: {line}")


def in_words(name: str, value: float) -> str:
    """A score for the terminal, as `exact match 89.5 %` and `loss 0.0122`."""
    return f"{name.replace('_', ' ')} {f'{100 * value:.1f} %' if metrics.SCORES[name].is_share else f'{value:.3g}'}"


def measure(
    model: PreTrainedModel,
    reader: ReplyReader,
    rows: Sequence[HeldoutRow],
    details: TokenizeRecord,
    settings: EvaluateSettings,
    backend: str,
    chosen: Sequence[str],
    progress: Progress,
) -> Measured:
    """Measure the losses of all rows, and let the model reply to those with a prompt.

    speculative_decoding gives a row's losses and its reply in one pass, if the prompt is the one that training saw.
    `chosen`: the metrics.
    """
    asked = [row for row in rows if row.prompt]
    if not asked:
        return Measured(row_losses(model, rows, progress))
    tokenizer = reader.tokenizer
    plan = plan_replies(model, tokenizer, asked, details, settings, progress)
    one_pass = backend == "hf" and speculative_decoding.supports(model)
    shared = {row.id for row, request in zip(asked, plan.requests, strict=True) if one_pass and request.labels}
    alone = [row for row in rows if row.id not in shared]
    losses = dict(zip([row.id for row in alone], row_losses(model, alone, progress), strict=True))
    reply_model = make_reply_model(model, tokenizer, plan, backend, progress)
    questions: list[generation.Question] = [
        {"prompt": row.prompt_text, "reference": row.reference_text} for row in asked
    ]
    score = partial(score_reply, chosen, read=reader.answer)
    start = time.perf_counter()
    found = generation.generate(reply_model, questions, plan.limit.value, plan.stop, score)
    seconds = time.perf_counter() - start
    replies: dict[str, CountedReply] = {}
    answers: dict[str, str] = {}
    for row, reply, request in zip(asked, found, plan.requests, strict=True):
        counts = reply_model.written[tuple(request.ids[: request.prompt_length])]
        answers[row.id] = reader.answer(reply["reply"])
        replies[row.id] = {**reply, **counts, "reply": reader.shown(reply["reply"])}
    if isinstance(reply_model, generation.SpeculativeReplyModel):
        for row, values in zip(asked, reply_model.losses, strict=True):
            if row.id in shared and values is not None:
                losses[row.id] = values.double().cpu()
    new_tokens = sum(reply["new_tokens"] for reply in replies.values())
    generation.say_total(len(replies), new_tokens, seconds, progress)
    facts: GenerationFacts = {
        "seconds": round(seconds, 2),
        "new_tokens": new_tokens,
        "truncated": sum(reply["truncated"] for reply in replies.values()),
        "looped": sum(reply.get("looped", False) for reply in replies.values()),
        "prompts_cut": sum(row.is_cut(plan.limit.value, plan.context) for row in asked),
        "prompts_unlike_training": sum(not row.is_as_trained() for row in asked),
    }
    return Measured([losses[row.id] for row in rows], replies, answers, plan, facts)


def plan_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[HeldoutRow],
    details: TokenizeRecord,
    settings: EvaluateSettings,
    progress: Progress,
) -> ReplyPlan:
    """Choose how the replies to the rows `asked` are written, and warn of prompts that are odd."""
    context = context_length(model)
    limit = choose_max_new_tokens(settings.max_new_tokens, details["reply_tokens"]["train"], context)
    if differ := sum(not row.is_as_trained() for row in asked):
        progress.say(f"warning: {differ} of {len(asked)} prompts aren't those that training used, token for token")
    if cut := sum(row.is_cut(limit.value, context) for row in asked):
        progress.say(f"warning: {cut} of {len(asked)} prompts lose their beginning, to fit the context of {context}")
    longest = max(len(row.prompt_ids) for row in asked)
    batch = choose_batch_size(settings.batch_size, model, len(asked), min(longest + limit.value, context))
    stop = details["end_of_turn"]
    return ReplyPlan(
        limit=limit,
        batch_size=batch,
        context=context,
        stop=stop["token"],
        stop_ids=sorted({stop["id"], *(end["id"] for end in details["reply_ends"]), *eos_ids(model, tokenizer)}),
        requests=[make_request(row, limit.value, context) for row in asked],
    )


def make_request(row: HeldoutRow, limit: int, context: int) -> speculative_decoding.Request:
    """The prompt, with the reference as draft tokens and with labels where prompt and reference stand so."""
    prompt = row.prompt_ids[-(context - limit) :]
    if row.is_as_trained() and not row.is_cut(limit, context) and len(row.input_ids) <= context:
        return speculative_decoding.Request(row.input_ids, len(prompt), row.labels)
    return speculative_decoding.Request(prompt, len(prompt))


def make_reply_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    plan: ReplyPlan,
    backend: str,
    progress: Progress,
) -> generation.ReplyModel:
    """The lm-eval model that replies.

    With "vllm" the model given is emptied: its memory is vLLM's from then on.
    """
    if backend == "vllm":
        from adder.evaluation.vllm_generation import VllmReplyModel  # imports vLLM

        dtype = str(model.dtype).removeprefix("torch.")
        cast(Any, model).to("meta")
        torch.cuda.empty_cache()
        return VllmReplyModel(
            Path(str(model.name_or_path)), Path(str(tokenizer.name_or_path)), dtype, plan.stop_ids, plan.context
        )
    common = (model, tokenizer, plan.stop_ids, plan.batch_size.value, plan.context)
    if speculative_decoding.supports(model):
        return generation.SpeculativeReplyModel(*common, plan.requests, progress)
    return generation.HfReplyModel(*common, len(plan.requests), progress)


def answer(reply: str) -> str:
    """A reply without the reasoning before it, where it is marked in the usual way."""
    return reply.rpartition("</think>")[2].strip() if "</think>" in reply else reply


def score_reply(
    chosen: Sequence[str], reference: str, reply: str, read: Callable[[str], str] = answer
) -> dict[str, float]:
    """Scores of one reply, 0 to 1 each; reasoning isn't compared: `read` takes it off both texts."""
    return metrics.score_reply(chosen, read(reference), read(reply))


def make_sample(
    row: HeldoutRow, losses: torch.Tensor, reply: CountedReply | None, kind: str, said: str | None = None
) -> SampleRecord:
    """One line of samples.jsonl. `said`: the reply's answer, where it isn't `answer` of the reply."""
    sample: SampleRecord = {
        "id": row.id,
        "prompt": row.prompt,
        "reference": row.reference,
        "loss": float(losses.mean()) if len(losses) else 0.0,
        "labelled_tokens": len(losses),
        "reply": None,
    }
    if row.group is not None:
        sample["group"] = row.group
    if reply is None:
        return sample
    sample = {**sample, **reply}
    if kind == "json":
        expected, found = parse_object(row.reference), parse_object(answer(reply["reply"]) if said is None else said)
        assert expected is not None  # else the kind were another one
        sample["fields"] = compare_fields(expected, found)
    return sample


def summarise(samples: Sequence[SampleRecord]) -> dict[str, Any]:
    """Each score with its interval, as scores.json has it under "heldout". Rows of a group count together."""
    asked = [sample for sample in samples if sample["reply"] is not None]
    scores: dict[str, Any] = {}
    for name, score in metrics.SCORES.items():
        of_replies = isinstance(score, metrics.ReplyScore) or score.of_replies
        rows = cast(Sequence[Mapping[str, Any]], asked if of_replies else samples)
        clusters = intervals.clusters_of(rows)
        if isinstance(score, metrics.ReplyScore):
            if rows and name in rows[0]:
                scores[name] = intervals.mean([row[name] for row in rows], clusters, "share")
        elif score.exponential_of:
            scores[name] = intervals.perplexity(scores[score.exponential_of])
        elif rows and (score.form is None or "fields" in rows[0]):
            parts = [score.parts(cast(metrics.ScoredRow, row)) for row in rows]
            scale = "share" if score.is_share else "positive"
            scores[name] = intervals.ratio([top for top, _ in parts], [bottom for _, bottom in parts], clusters, scale)
    fields = [sample["fields"] for sample in asked if "fields" in sample]
    if fields:
        scores["fields"] = field_table(fields)
    return scores
