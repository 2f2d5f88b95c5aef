"""The model card, README of the merged model, in the hub's format: YAML that the hub reads, Markdown for people.

It says what the model was made from, how, and what was measured of it, and no more than that. Whatever comes from data,
settings or file names is escaped.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from adder.data.model_types import ModelRecord
from adder.evaluation.metrics import SCORES
from adder.report import regression_guard
from adder.report.data_card import fenced, table, text
from adder.report.facts import RunFacts
from adder.report.formatting import number, percent, public, sentence, setting
from adder.report.resolved_settings import resolve, title
from adder.report.run_metrics import Metrics
from adder.report.sections.data_section import USES
from adder.report.sections.evaluation_section import ComparedRow, compared_row, compared_score, is_share
from adder.report.stage import ReportSettings
from adder.tokenization.records import Token, TokenizeRecord

Resolved = Mapping[str, Any]
"""The value of every setting, by its path."""
# The hub's identifiers of licences (huggingface.co/docs/hub/repositories-licenses); it refuses a card with another one.
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
    other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
# Settings that make the model what it is; those of the evaluation stand with the scores, the data in a table.
MAKING = ("format", "tokenize", "lengths", "train", "merge")
# Of a source's split: without one, a share of its rows is held out and the others are trained on.
TRAINED = ("train", None)
ADAPTERS = {"qlora": "LoRA on the base quantised to NF4", "lora": "LoRA", "full": "training of all weights"}


def model_card(settings: ReportSettings, facts: RunFacts, metrics: Metrics) -> str:
    """The card as Markdown.

    `facts` as `facts.load` has them, `metrics` as `run_metrics.build_metrics`.
    """
    chosen = {row["key"]: row["value"] for row in resolve(settings, facts)}
    name = title(settings)
    sections = [
        f"# {text(name)}",
        f"**{text(metrics['verdict']['sentence'])}**",
        f"A {text(_method(chosen))} of {text(public(facts.model['source']))}, made and measured with Adder.",
        "## How to use it",
        *_usage(facts, chosen),
        "## What it was made from",
        _origin(facts, chosen),
        *_data(facts),
        "## How it was trained",
        *_settings(settings, facts),
        "## What was measured",
        *_scores(facts, metrics),
        "## What was not",
        "\n".join(f"- {limit}" for limit in _limits(facts, metrics)),
    ]
    head = yaml.safe_dump(front_matter(name, facts, chosen, metrics), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(name: str, facts: RunFacts, chosen: Resolved, metrics: Metrics) -> dict[str, Any]:
    """What the hub reads of the card: library, task, base, licence, data sets, language, tags, results."""
    model, method = facts.model, chosen.get("train.method")
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if model["kind"] == "hub":
        head |= {"base_model": model["source"], "base_model_relation": "finetune"}
    head |= _license(model["license"])
    trained = [source for source in facts.data if source["split"] in TRAINED]
    if datasets := sorted({source["hub"]["id"] for source in trained if "hub" in source}):
        head["datasets"] = datasets
    if trained and all(source["kind"] == "builtin" for source in trained):
        head["language"] = ["en"]  # of other data nobody said
    kinds = {"qlora": ["lora", "qlora"], "lora": ["lora"]}.get(method or "", [])
    kinds += ["dora"] if kinds and chosen.get("train.use_dora") else []
    chat = [] if facts.tuned.get("max_new_tokens") is None else ["conversational"]
    head["tags"] = sorted(["adder", *chat, *kinds])
    head["model-index"] = [{"name": name, "results": _results(facts, metrics)}]
    return head


def _license(stated: str | None) -> dict[str, str]:
    if not stated:
        return {}
    name = str(stated).lower()
    if name in LICENSES:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name).strip("-")}


def _results(facts: RunFacts, metrics: Metrics) -> list[dict[str, Any]]:
    """The tuned model's scores as the hub's model-index has them."""
    sources = [source for source in facts.data if source["split"] in ("heldout", None)]
    names = list(dict.fromkeys(public(source["name"]) for source in sources))
    hub = {source["hub"]["id"] for source in sources if "hub" in source}
    dataset = {
        "name": f"held-out rows of {', '.join(names)}",
        "type": hub.pop() if len(hub) == 1 and len(names) == 1 else "private",
        "split": "heldout",
    }
    scores = [
        {"type": SCORES[name].hub, "value": tuned["value"], "name": SCORES[name].label}
        for name, entry in metrics["heldout"].items()
        if (tuned := entry["tuned"]) and tuned["value"] is not None
    ]
    found = [_result(dataset, scores)]
    for row in metrics["tasks"]:
        dataset = {"name": row["task"], "type": row["task"], "args": {"num_fewshot": row["num_fewshot"]}}
        found.append(_result(dataset, [{"type": row["metric"], "value": row["tuned"]["value"], "name": row["metric"]}]))
    return found


def _result(dataset: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": scores}


def _method(chosen: Resolved) -> str:
    return f"fine-tuned version ({ADAPTERS[chosen['train.method']]})"


def _usage(facts: RunFacts, chosen: Resolved) -> list[str]:
    """transformers, vLLM and Ollama, with the system prompt that it was trained with and the longest reply expected."""
    return [
        "In place of `path/to/this/folder` stands this folder, or this repository's name once it is on the hub.",
        fenced(_python(facts, chosen.get("format.system_prompt")), "python"),
        "A server with OpenAI's interface, by [vLLM](https://docs.vllm.ai):",
        fenced("vllm serve path/to/this/folder", "sh"),
        "On a desk, by [Ollama](https://ollama.com), with a file named `Modelfile` in this folder (a GGUF file in "
        "place of its point, where Ollama doesn't convert this architecture):",
        fenced(_modelfile(facts, chosen.get("format.system_prompt"))),
        fenced("ollama create my-model -f Modelfile\nollama run my-model", "sh"),
        "`ollama show --template my-model` must not print just `{{ .Prompt }}`: then Ollama didn't know the chat "
        "template, and it belongs into the Modelfile.",
        *_advice(facts, chosen.get("format.system_prompt")),
    ]


def _python(facts: RunFacts, system: str | None) -> str:
    lines = [
        "from transformers import pipeline",
        "",
        'model = pipeline("text-generation", model="path/to/this/folder")',
    ]
    limit = facts.tuned.get("max_new_tokens")
    if limit is None:  # trained on plain texts
        return "\n".join([*lines, 'print(model("…", max_new_tokens=200)[0]["generated_text"])'])
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": "…"}]
    call = f"model(messages, max_new_tokens={limit['value']}, do_sample=False)"
    return "\n".join([*lines, f"messages = {messages!r}", f'print({call}[0]["generated_text"][-1]["content"])'])


def _modelfile(facts: RunFacts, system: str | None) -> str:
    """Ollama's: greedy decoding, as the model was measured, and the system prompt that it was trained with."""
    if facts.tuned.get("max_new_tokens") is None:  # trained on plain texts
        return "FROM ."
    lines = ["FROM .", "PARAMETER temperature 0"]
    # Three quotes end a text only at the end of a line, and nothing can be put before them that takes that away.
    if system and not any(line.rstrip().endswith('"""') for line in system.splitlines()):
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines)


def _advice(facts: RunFacts, system: str | None) -> list[str]:
    if facts.tuned.get("max_new_tokens") is None:
        return ["It was trained to continue plain texts, not to chat."]
    found = [
        "It is a chat model: the chat template that it was trained with is in its tokenizer. It was measured with "
        "greedy decoding (temperature 0)."
    ]
    if system:
        found.append("It was trained with the system prompt above, which belongs before every conversation.")
    return found


def _ends(tokenize: TokenizeRecord) -> list[Token]:
    """What ends a reply, the usual end first."""
    return [tokenize["end_of_turn"], *tokenize["reply_ends"]]


def _origin(facts: RunFacts, chosen: Resolved) -> str:
    model, tokenize = facts.model, facts.tokenize
    train = tokenize["counts"]["train"]
    unit = "examples" if train["split"] else "conversations"
    base = f"[{text(model['source'])}](https://huggingface.co/{model['source']})"
    rows = [
        ("Base model", base if model["kind"] == "hub" else text(public(model["source"]))),
        ("Its revision", text(model["revision"] or "none: it has no versions")),
        ("Its licence", text(model["license"] or "not stated")),
        ("Its parameters", f"{model['parameters']:,}"),
        ("Method", text(_details(chosen))),
        ("Trained on", f"{train['examples']:,} {unit}, {train['labelled']:,} tokens with loss"),
        ("End of turn", text(", ".join(dict.fromkeys(end["token"] for end in _ends(tokenize))))),
    ]
    if tokenize["template_variables"]:
        rows.append(("Chat template's variables", text(json.dumps(tokenize["template_variables"], ensure_ascii=False))))
    if model.get("sha256"):
        rows.insert(2, ("Its SHA-256", text(model["sha256"])))
    if came := came_as(model):
        rows.insert(-3, ("It came as", text(came)))
    if earlier := model.get("adapter"):
        rows.insert(-2, ("Goes on from", text(earlier["source"])))
    return table(("", ""), rows)


def came_as(model: ModelRecord) -> str | None:
    """How a base came that was quantised, and what was made of it; None for one in 16 bit."""
    found = model.get("quantised")
    if not found:
        return None
    made = f"{found['method']} ({found['stored_bytes'] / 1e9:.3g} GB), dequantised to {found['dtype']}"
    return f"{made}; QLoRA trains the 4-bit weights as they came" if found["trained_as_it_is"] else made


def _details(chosen: Resolved) -> str:
    method = chosen["train.method"]
    if method == "full":
        return ADAPTERS[method]
    kind = ADAPTERS[method].replace("LoRA", "DoRA" if chosen.get("train.use_dora") else "LoRA")
    return (
        f"{kind}, rank {chosen['train.lora_r']}, alpha {chosen['train.lora_alpha']:g}; merged into the base's weights"
    )


def _data(facts: RunFacts) -> list[str]:
    """The sources of the rows that were trained on or held out, each with its licence and what pins it."""
    uses = {split: use for split, use in USES.items() if split != "test"}
    rows = [
        (
            text(public(source["name"])),
            _hub_link(source["hub"]["id"]) if "hub" in source else text(source["kind"]),
            text(source.get("license") or "not stated"),
            f"{source['rows']:,}",
            uses[source["split"]],
            text(source.get("revision") or source.get("sha256") or "–"),
        )
        for source in facts.data
        if source["split"] in uses
    ]
    head = ("Data", "From", "Licence", "Rows", "Use", "Commit or SHA-256")
    return [table(head, rows, (3,)), "What became of each row stands in the data card (`card.md`) of the run."]


def _hub_link(name: str) -> str:
    return f"[{text(name)}](https://huggingface.co/datasets/{name})"


def _settings(settings: ReportSettings, facts: RunFacts) -> list[str]:
    """The settings that somebody gave and that differ from the defaults, or those that a stage chose."""
    rows = [
        (text(row["key"]), text(public(setting(row["value"]))), text(public(sentence(row["reason"] or ""))))
        for row in resolve(settings, facts)
        if row["key"].split(".")[0] in MAKING and row["from"] in ("config", "run", "chosen")
    ]
    intro = "Settings that are not the default, and, with their reasons, those that were chosen by measuring:"
    return [intro, table(("Setting", "Value", "Why"), rows)] if rows else ["All settings are the defaults."]


def _scores(facts: RunFacts, metrics: Metrics) -> list[str]:
    """Base and tuned on the same rows; differences with their 95 % intervals."""
    head = ("", "Base", "This model", "Difference", "95 % interval", "Rows")
    rows = [_score_row(SCORES[name].label, compared_score(name, entry)) for name, entry in metrics["heldout"].items()]
    found = [
        f"On {metrics['verdict']['n']:,} held-out rows, kept out of this training; both models had the same prompts "
        "and template, by lm-evaluation-harness:",
        table(head, rows, (1, 2, 3, 5)),
    ]
    if metrics["tasks"]:
        tasks = []
        for row in metrics["tasks"]:
            share = is_share(row)
            cells = compared_row(row, share, percent if share else number)
            tasks.append(_score_row(f"{row['task']}, {row['metric']}", cells))
        found += ["On other tasks:", table(head, tasks, (1, 2, 3, 5))]
    if metrics["guard"]:
        found.append(text(regression_guard.check(metrics["tasks"])["sentence"]))
    if metrics["judge"]:
        judge, name = metrics["judge"], public(metrics["judge"]["model"])
        found.append(text(f"A judge ({name}) compared replies blind, in both orders. {judge['sentence']}"))
    if reason := facts.merge.get("reason"):
        found.append(f"The merge was checked: {text(public(reason))}")
    return found


def _score_row(name: str, row: ComparedRow) -> tuple[str, ...]:
    values = [cell.value if cell else "–" for cell in (row.base, row.tuned)]
    interval = " to ".join(row.ci) if row.ci else "–"
    cells = (name, *values, row.difference or "–", interval, f"{row.n:,}" if row.n else "–")
    return tuple(text(cell) for cell in cells)


def _limits(facts: RunFacts, metrics: Metrics) -> Iterable[str]:
    """What the measurements don't tell, as far as the run knows it."""
    longest = facts.lengths["max_seq_length"]["value"]
    yield "The scores are of rows like the training rows. How the model does on other requests wasn't measured" + (
        " beyond the tasks above."
        if metrics["tasks"]
        else "; a fine-tuned model often loses skills that it isn't shown."
    )
    yield (
        "Not measured: whether replies are true, safe or fair, other languages than those of the data, and attacks by "
        "hostile prompts. What is known of the base in this holds at best."
    )
    yield f"Conversations were at most {longest:,} tokens long in training; longer ones weren't tried."
    if metrics["verdict"]["verdict"] == "can't tell":
        rows = "" if metrics["verdict"]["doubts"] else " from this many rows"
        yield f"Whether it is better than its base can't be told{rows}."
    for doubt in metrics["verdict"]["doubts"]:
        yield f"What stands against the scores: {doubt}."
    unstated = sum(source["split"] == "train" and not source.get("license") for source in facts.data)
    if unstated or not facts.model["license"]:
        yield "Not every licence is stated (see the tables above)."
    yield "Whether the licences of base and data allow a use together wasn't checked by anybody; all of them apply."
