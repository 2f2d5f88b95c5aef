"""What each architecture can do, tried with tiny random models through the real stages: the table of docs/models.md.

    PYTHONPATH=workflow_scripts:tests python tests/model_matrix.py            # all of them, and the table
    PYTHONPATH=workflow_scripts:tests python tests/model_matrix.py llama gpt2 # only print these
    PYTHONPATH=workflow_scripts:tests python tests/model_matrix.py --write llama gpt2 # and their lines of the table

A cell is `right` where the stage ran and what it says of itself held (the proof, the loss of the model read back), the
beginning of a refusal where Adder refused, `fails` where something broke without a word, and `–` where an earlier stage
left nothing to try.
"""

import contextlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from adder.core import text_model
from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context, Runtime
from adder.evaluation import run as evaluation
from adder.evaluation.stage import EvaluateSettings
from adder.export import gguf
from adder.export.stage import GgufSettings
from adder.kernels.labelled_loss import labelled_logits
from adder.merging import fresh_process_reply, verification
from adder.merging import run as merging
from adder.merging.stage import MergeSettings
from adder.tokenization.token_table import TokenRow, TokenTable
from architectures import ARCHITECTURES, tiny_architecture
from gguf_tokenizers import TOKENIZERS
from tiny import CHATML, write_conversations, write_training_inputs
from training_stage import run_training, train_settings

DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin (made by tests/model_matrix.py) -->", "<!-- models: end -->"
COLUMNS = ("packs", "qlora", "lora", "full", "merge and proof", "read back", "evaluate", "GGUF")
RIGHT, NOT_TRIED = "right", "–"
# Random weights of the usual size, so that rounding to bf16 moves predictions as little as a trained model's does.
SMALL = 0.05
Row = dict[str, str]


def row(name: str, work: Path) -> Row:
    """What the architecture of this model_type can do, by COLUMNS; `work`: an empty folder."""
    base = work / "base"
    _save(name, base)
    inputs = _inputs(work / "inputs", base)
    cells: Row = dict.fromkeys(COLUMNS, NOT_TRIED)
    for method in ("qlora", "lora", "full"):
        cells[method] = _tried(lambda method=method: _train(method, inputs, work / method))
    plan = next((work / m / "plan.json" for m in ("qlora", "lora", "full") if (work / m / "plan.json").exists()), None)
    if plan:
        attention = read_json(plan)["attention"]["value"]
        cells["packs"] = "one example at a time" if attention.endswith("one example at a time") else "at once"
    merged = None
    adapters: tuple[Literal["qlora", "lora"], ...] = ("qlora", "lora")
    for method in adapters:
        if cells[method] == RIGHT:
            merged = work / f"merged-{method}"
            cells["merge and proof"] = _tried(lambda m=method, out=merged: _merge(m, inputs, work / m, out))
            if cells["merge and proof"] != RIGHT:
                break
    if merged is None or cells["merge and proof"] != RIGHT:
        return cells
    cells["read back"] = _tried(lambda: _read_back(merged, inputs))
    cells["evaluate"] = _tried(lambda: _evaluate(merged, inputs, work / "scores"))
    cells["GGUF"] = _tried(lambda: _gguf(merged, work / "gguf"))
    return cells


def _tried(action: Callable[[], None]) -> str:
    """`right`, why Adder refused, or how it broke."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            action()
    except UserError as error:
        return f"refused: {_short(str(error))}"
    except Exception as error:  # the table is about what happens, whatever that is
        return f"fails: {type(error).__name__}: {_short(str(error))}"
    return RIGHT


def _short(text: str) -> str:
    """The first clause of a message, without the setting that leads it, folders and what differs from run to run."""
    text = " ".join(text.split())
    text = re.sub(r"^(model|train|merge|export|evaluate)\.\w+: ", "", text)
    text = re.sub(r"/\S+", "…", text)
    text = re.sub(r"(its architecture) is \w+", r"\1", text)  # which the line names
    text = re.sub(r"(?<![A-Za-z\d.])\d+(\.\d+)?(e-?\d+)?( %|%)?", "N", text)  # but m1, Qwen3
    return text.partition(";")[0].replace("|", "/")[:160]


def _save(name: str, folder: Path) -> None:
    """The architecture with a vocabulary that GGUF can say, in bf16."""
    tokenizer = TOKENIZERS["gpt-2"]()
    tokenizer.chat_template = CHATML
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny_architecture(name, torch.bfloat16, vocab_size=len(tokenizer), **ids)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SMALL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _inputs(folder: Path, base: Path) -> dict[str, Path]:
    inputs = write_training_inputs(folder, base, packs=2)
    shutil.rmtree(inputs["tokenize"] / "tokenizer")
    (inputs["tokenize"] / "tokenizer").mkdir()
    for path in base.glob("*"):
        if path.name.startswith(("tokenizer", "special", "chat_template", "vocab", "merges")):
            shutil.copyfile(path, inputs["tokenize"] / "tokenizer" / path.name)
    end = read_json(base / "config.json").get("eos_token_id")
    replies = {split: {"max": 8} for split in ("train", "heldout")}
    end_of_turn = {"token": "<|im_end|>", "id": end}
    details = {"end_of_turn": end_of_turn, "reply_ends": [{**end_of_turn, "replies": 1}], "reply_tokens": replies}
    write_json(inputs["tokenize"] / "tokenize.json", {**details, "counts": {"train": {"examples": 6, "labelled": 40}}})
    asked = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}]
    rows = [{"id": row["id"], "messages": asked} for row in _rows(inputs)]
    write_conversations(inputs["format"] / "heldout.parquet", rows)
    return inputs


def _rows(inputs: dict[str, Path]) -> list[TokenRow]:
    table = TokenTable(inputs["tokenize"] / "heldout.arrow")
    return [table.row(number) for number in range(len(table))]


def _train(method: str, inputs: dict[str, Path], out: Path) -> None:
    out.mkdir()
    how: dict[str, Any] = {"epochs": 1, "effective_batch_size": 6, "eval_samples": 0, "samples": 0}
    how |= {} if method == "full" else {"lora_r": 4, "learning_rate": 1e-3}
    settings = train_settings(method=method, compute_dtype="float32", **how)
    run_training(settings, inputs, out, Progress.silent(), runtime={"checkpoints": 0})


def _merge(method: Literal["qlora", "lora"], inputs: dict[str, Path], trained: Path, out: Path) -> None:
    out.mkdir()
    folders = {**{name: inputs[name] for name in ("model", "tokenize", "format")}, "train": trained}
    settings = MergeSettings(method=method, base="original" if method == "qlora" else "auto")
    merging.run(settings, merging.MergeInputs(**folders), out, Context(Progress.silent(), Runtime(threads=1)))


def _read_back(merged: Path, inputs: dict[str, Path]) -> None:
    """transformers loads what was written, all of it, and its held-out loss is that of the proof."""
    how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    kind = text_model.auto_class(text_model.read_config(merged / "model"))
    loaded: Any = kind.from_pretrained(merged / "model", **how)
    model, told = loaded
    missing = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[key]]
    assert not missing, f"{missing[0]} is missing, unexpected or of another shape"
    proof = read_json(merged / "proof.json")
    rows = verification.spread_rows(inputs["tokenize"] / "heldout.arrow", 16, 1024)
    sums, count = 0.0, 0
    for one in rows:
        logits, target = labelled_logits(model.eval(), list(one["input_ids"]), list(one["labels"]))
        sums += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    apart = abs(sums / count - proof["heldout_loss"]["merged"])
    assert apart < 1e-4, f"the held-out loss is {apart:.2g} nats off the proof's"


def _evaluate(merged: Path, inputs: dict[str, Path], out: Path) -> None:
    out.mkdir()
    folders = evaluation.EvaluateInputs(model=merged, tokenize=inputs["tokenize"], format=inputs["format"])
    settings = EvaluateSettings(max_samples=2, max_new_tokens=4)
    evaluation.run(settings, folders, out, Context(Progress.silent(), Runtime(threads=1)))


def _gguf(merged: Path, out: Path) -> None:
    out.mkdir()
    gguf.run(GgufSettings(type="f32"), gguf.GgufInputs(merged), out, Context(Progress.silent(), Runtime(threads=1)))


def reply_here(model: Path, prompt: list[int], device: str) -> tuple[Any, str]:
    """What a fresh process would reply, without the seconds that one takes to start."""
    reply = fresh_process_reply.greedy_reply(str(model), "float32", "cpu", prompt, 8)
    return reply, "float32"


def table(rows: dict[str, Row]) -> str:
    """Architectures that are alike share a line, in the order of ARCHITECTURES."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in ARCHITECTURES:
        if name in rows:
            alike.setdefault(tuple(rows[name][column] for column in COLUMNS), []).append(name)
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", f"|{'---|' * (1 + len(COLUMNS))}"]
    lines += [f"| {', '.join(f'`{n}`' for n in names)} | {' | '.join(cells)} |" for cells, names in alike.items()]
    return "\n".join(lines)


def documented() -> dict[str, Row]:
    """What docs/models.md says of each architecture."""
    text = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    found: dict[str, Row] = {}
    for line in text.strip().splitlines()[2:]:
        names, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        for name in names.split(", "):
            found[name.strip("`")] = dict(zip(COLUMNS, cells, strict=True))
    return found


def main() -> None:
    """Try those on the command line, or all and write their table."""
    verification.reply_of_fresh_process = reply_here
    names = [name for name in sys.argv[1:] if name != "--write"]
    rows: dict[str, Row] = documented() if names else {}
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(name, Path(folder))
        print(name, rows[name], flush=True)
    if not names or "--write" in sys.argv:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
