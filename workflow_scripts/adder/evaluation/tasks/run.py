"""Measure one model on a task beyond the held-out rows: one of lm-eval's by name, or a YAML file of the user's.

The task's own prompt, few-shot examples and scorer, run by lm-eval; through the model's chat template unless told
otherwise. A base and a tuned model get the same questions, so that they can be compared one by one.
"""

import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adder.core import hardware, intervals, opened_files, precision
from adder.core.errors import UserError
from adder.core.files import files_in, read_json, write_json, write_jsonl
from adder.core.intervals import Estimate
from adder.core.stage_spec import Context
from adder.evaluation.model_loading import load_model, try_kernels
from adder.evaluation.tasks.lm_eval_model import TaskModel
from adder.evaluation.tasks.records import SubtaskScore, TaskSample, TaskScoresRecord
from adder.evaluation.tasks.stage import TaskSettings
from adder.evaluation.tasks.task_files import name_of, task_files
from adder.evaluation.tasks.task_loading import load_tasks
from adder.tokenization.records import TokenizeRecord

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234}  # lm-eval's own
LONGEST_TEXT = 2000  # characters of a prompt that samples.jsonl keeps

Results = dict[str, Any]  # what lm_eval.evaluate returns


@dataclass(frozen=True)
class TaskInputs:
    """Folders of the stages that are read; model: the base's, or the merged one's."""

    model: Path
    tokenize: Path


@dataclass(frozen=True)
class Document:
    """A question of a task, with its line of samples.jsonl and its value in each metric."""

    task: str
    sample: TaskSample
    values: dict[str, float] = field(default_factory=dict)


def run(settings: TaskSettings, inputs: TaskInputs, out: Path, context: Context) -> dict[str, object]:
    """Evaluate `inputs.model`/model on the task that `settings`, an entry of `evaluate.tasks`, names.

    Writes scores.json and samples.jsonl into `out`; returns the score that counts, by its name, and as `also_read` the
    digests of what code of the user's opened by itself. Raises UserError when there is no such task, its data or
    packages aren't there, or it has no score to compare models by.
    """
    if settings.path is None:
        return _evaluate(settings, inputs, out, context)
    known = [*task_files(settings, Path.cwd()), *files_in(inputs.model), *files_in(inputs.tokenize)]
    also_read: dict[str, str] = {}
    with opened_files.noted(settings.path, known, also_read, context, only_files=True):
        found = _evaluate(settings, inputs, out, context)
    return {**found, "also_read": also_read} if also_read else found


def _evaluate(settings: TaskSettings, inputs: TaskInputs, out: Path, context: Context) -> dict[str, object]:
    hardware.use_threads(context.threads)
    device, progress = context.device, context.progress
    progress.say(f"reading {name_of(settings)}")
    tasks = load_tasks(settings, Path.cwd())
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(inputs.tokenize / "tokenizer")
    details: TokenizeRecord = read_json(inputs.tokenize / "tokenize.json")
    as_chat = settings.chat_template and tokenizer.chat_template is not None
    if settings.chat_template and not as_chat:
        progress.say("warning: the model has no chat template, so the questions are asked as plain text")
    dtype = precision.compute_dtype(device)
    progress.say(f"loading the model on {device} in {dtype.value}")
    try_kernels(inputs.model / "model", dtype.value, context)
    loaded = load_model(inputs.model / "model", dtype.value, device)
    model = TaskModel(loaded, tokenizer, details["end_of_turn"], details["reply_ends"], as_chat, progress)
    start = time.perf_counter()
    results = ask(model, tasks, settings.limit, as_chat)
    seconds = round(time.perf_counter() - start, 2)
    progress.line(f"{model.asked:,} requests in {seconds:,.0f} s", last=True)
    documents, first = collect(results, tasks), next(iter(tasks))
    metrics = score(documents, results, tasks, name_of(settings))
    metric = choose_metric(settings.metric, metrics, name_of(settings))
    scores: TaskScoresRecord = {
        "task": settings.name or Path(str(settings.path)).stem,
        "version": results["versions"][first],
        "metric": metric,
        "higher_is_better": is_higher_better(results, tasks, metric),
        "metrics": metrics,
        "subtasks": subtasks(documents, metric) if len(tasks) > 1 else None,
        "num_fewshot": results["n-shot"][first] or 0,
        "limit": settings.limit,
        "chat_template": as_chat,
        "prompts_cut": model.prompts_cut,
        "lm_eval_version": version("lm_eval"),
        "compute_dtype": dtype.to_dict(),
        "seconds": seconds,
    }
    write_json(out / "scores.json", scores)
    write_jsonl(out / "samples.jsonl", ({**document.sample, **document.values} for document in documents))
    return {metric: metrics[metric]["value"]}


def ask(model: TaskModel, tasks: Mapping[str, Task], limit: int | None, as_chat: bool) -> Results:
    """Run lm-eval on the tasks, with its own seeds, and few-shot examples as turns of a chat where there is one."""
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    # `evaluate`, not `simple_evaluate`: that one also asks the hub about the model and lists the machine's packages.
    lm: Any = model
    chosen: Any = {"tasks": dict(tasks), "groups": {}}
    results: Any = evaluate(
        lm,
        chosen,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=as_chat,
        fewshot_as_multiturn=as_chat,
    )
    return results


def collect(results: Results, tasks: Mapping[str, Task]) -> list[Document]:
    """The documents of all tasks, in order.

    A metric that a task computes for several ways of reading a reply is called `metric,way`, as lm-eval has it. Values
    are numbers; what isn't one number a document is left out.
    """
    found: dict[tuple[str, int], Document] = {}
    for name, task in tasks.items():
        for logged in results["samples"][name]:
            sample = _sample(name, task, logged)
            document = found.setdefault((name, logged["doc_id"]), Document(name, sample))
            for metric in logged["metrics"]:
                with contextlib.suppress(TypeError, ValueError):  # lists, pairs, texts
                    document.values[metric_name(metric, logged["filter"])] = float(logged[metric])
    return [found[key] for key in sorted(found, key=lambda key: (list(tasks).index(key[0]), key[1]))]


def metric_name(metric: str, way: str) -> str:
    """lm-eval's key without the filter's name where there is just the default one."""
    return metric if way == "none" else f"{metric},{way}"


def _sample(name: str, task: Task, logged: dict[str, Any]) -> TaskSample:
    prompt = str(logged["arguments"][0][0])
    reference, reply = logged["target"], None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [str(argument[1]).strip() for argument in logged["arguments"]]
        likelihoods = [response[0] for response in logged["filtered_resps"]]
        reply = choices[int(np.argmax(likelihoods))]
        if isinstance(reference, int) and 0 <= reference < len(choices):
            reference = choices[reference]
    elif task.OUTPUT_TYPE == "generate_until":
        reply = str(logged["resps"][0][0])
    if isinstance(reference, list):
        reference = " | ".join(map(str, reference))
    return {
        "id": f"{name}:{logged['doc_id']}",
        # The question stands at the end, behind examples.
        "prompt": prompt if len(prompt) <= LONGEST_TEXT else f"…{prompt[1 - LONGEST_TEXT :]}",
        "reference": str(reference),
        "reply": reply,
    }


def score(documents: Sequence[Document], results: Results, tasks: Mapping[str, Task], name: str) -> dict[str, Estimate]:
    """Estimate each metric that is a mean over documents, by its name; of several tasks, over all.

    So of a group each document counts once, which is lm-eval's mean weighted by size. A metric of another kind (a
    perplexity, an F1 over the whole data set) is left out, for two models can't be compared on it document by document.
    Raises UserError if none is left.
    """
    metrics: dict[str, Estimate] = {}
    for metric in documents[0].values:
        values = [document.values[metric] for document in documents if metric in document.values]
        if len(values) < len(documents) or not _is_mean(metric, documents, results, tasks):
            continue
        shares = all(0 <= value <= 1 for value in values)
        metrics[metric] = intervals.mean(values, scale="share" if shares else "any")
    if not metrics:
        known = ", ".join(metric for metric in results["results"][next(iter(tasks))] if "," in metric)
        raise UserError(
            f"evaluate.tasks: {name} has no score that is a mean over its questions ({known}), so base and tuned model "
            "can't be compared on it question by question"
        )
    return metrics


def _is_mean(metric: str, documents: Sequence[Document], results: Results, tasks: Mapping[str, Task]) -> bool:
    """Whether lm-eval's own figure is the mean of the documents' values, in each task."""
    key = metric if "," in metric else f"{metric},none"
    for name in tasks:
        values = [document.values[metric] for document in documents if document.task == name]
        if not np.isclose(float(np.mean(values)), results["results"][name][key], rtol=1e-9, atol=1e-12):
            return False
    return True


def choose_metric(wanted: str | None, metrics: Mapping[str, Estimate], name: str) -> str:
    """The metric that counts: as set, by its full name or the part before the comma, or the task's first."""
    if wanted is None:
        return next(iter(metrics))
    found = [metric for metric in metrics if metric == wanted] or [
        metric for metric in metrics if metric.partition(",")[0] == wanted
    ]
    if not found:
        raise UserError(f"evaluate.tasks ({name}).metric: {wanted!r} is none of its scores: {', '.join(metrics)}")
    return found[0]


def is_higher_better(results: Results, tasks: Mapping[str, Task], metric: str) -> bool:
    """Which way is better, by the task's word; up where it doesn't say."""
    return results["higher_is_better"][next(iter(tasks))].get(metric.partition(",")[0]) is not False


def subtasks(documents: Sequence[Document], metric: str) -> dict[str, SubtaskScore]:
    """The score of each member of a group, by its name."""
    values: dict[str, list[float]] = {}
    for document in documents:
        values.setdefault(document.task, []).append(document.values[metric])
    return {name: {"value": float(np.mean(own)), "n": len(own)} for name, own in values.items()}
