"""Tasks of a user's own, a model to ask, and the task stage run on them."""

from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from adder.core.files import read_json, read_jsonl
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.evaluation.tasks import run as tasks
from adder.evaluation.tasks import task_loading
from adder.evaluation.tasks.stage import TaskSettings

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k")

CHOICE = """\
task: capitals
include: common.yaml
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: data/*.jsonl}}
test_split: test
"""
WRITTEN = """\
task: capitals_written
include: common.yaml
output_type: generate_until
doc_to_text: !function helper.ask
doc_to_target: "{{choices[right]}}"
process_results: !function helper.score
generation_kwargs: {until: ["or"], max_gen_toks: 9}
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: false}
  - {metric: named, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
HELPER = """\
def ask(doc):
    return "Tell me: " + doc["question"]

def score(doc, results):
    return {"length": len(results[0]), "named": doc["choices"][doc["right"]] in results[0]}
"""
LIKELY = """\
task: capitals_likely
include: common.yaml
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[right]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
QUESTIONS = [
    {"question": f"What is the capital of country {n}?", "choices": ["Paris", "Order"], "right": n % 2}
    for n in range(12)
]


def entry(**settings):
    """An entry of `evaluate.tasks` with its defaults."""
    return TaskSettings(**settings)


def run(inputs, out, **settings):
    out.mkdir()
    context = Context(Progress.silent(), Runtime(threads=1))
    tasks.run(entry(**settings), tasks.TaskInputs(**inputs), out, context)
    return read_json(out / "scores.json"), list(read_jsonl(out / "samples.jsonl"))


def plainly(inputs, settings, root, as_chat=True):
    """What lm-eval's own model class makes of the task, one request at a time, in fp32."""
    loaded = task_loading.load_tasks(settings, root)
    model = AutoModelForCausalLM.from_pretrained(inputs["model"] / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenize"] / "tokenizer")
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    return lm_eval.evaluate(
        plain, {"tasks": loaded, "groups": {}}, limit=settings.limit, bootstrap_iters=0,
        apply_chat_template=as_chat, fewshot_as_multiturn=as_chat,
    )  # fmt: skip
