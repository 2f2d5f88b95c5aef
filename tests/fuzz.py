"""Rows and configurations made at random: none ends in a traceback, and each is accounted for.

Usage: python tests/fuzz.py [rows=100000] [configurations=10000] [--seed N] [--seconds N]

Rows go through the stages data, format and tokenize: each is used, held out, or listed with the reason why not.
Configurations are the settings' schema filled in at random, rightly and wrongly, some with their text damaged: each is
refused in sentences that name what is wrong, or is what the stages are given, key for key.
"""

import argparse
import collections
import contextlib
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflow_scripts")]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import yaml  # noqa: E402 - the paths above come first
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from adder.core.errors import UserError  # noqa: E402
from adder.core.files import read_json  # noqa: E402
from adder.core.progress import Progress  # noqa: E402
from adder.core.stage_spec import Context, NoInputs, Runtime  # noqa: E402
from adder.data import fetch_rows  # noqa: E402
from adder.data.stage import RowSettings, Source  # noqa: E402
from adder.formatting import run as formatting  # noqa: E402
from adder.tokenization import run as tokenization  # noqa: E402
from adder.tokenization.stage import TokenizeSettings  # noqa: E402
from adder.workflow import config_file, settings_docs, stage_graph  # noqa: E402
from broken_rows import LINE, accounted_for  # noqa: E402
from format_stage import format_settings  # noqa: E402

BATCH = 400  # lines of a source; of more, so mixed, hardly any have the form of most, and the source is refused
CONTEXT = Context(Progress.silent(), Runtime(threads=1))
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 1e-9, 1e30, math.inf, math.nan, 2**70, "", " ", "auto", "no", "1e-4", "ü", "\x00",
    [], {}, [1], [None], {"a": 1}, {"": None}, "a/b", "rows.jsonl", "../x", "${HOME}", "https://u:p@h/x", "x" * 5000,
]  # fmt: skip
ODD_KEYS: list[Any] = ["lr", "epoch", "", 1, None, True, 1.5, "train", "source", "runs", "ünknown", "a.b"]


def lines(number: int, seed_: int) -> list[bytes]:
    """So many lines of a JSONL file as hypothesis makes them, from garbage to good rows."""
    found: list[bytes] = []

    @seed(seed_)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(line=LINE)
    def collect(line: bytes) -> None:
        # A file that isn't UTF-8 is refused as a whole.
        found.append(line.decode("utf-8", "replace").encode().replace(b"\n", b" "))

    collect()
    return found


def rows_through_the_stages(batch: list[bytes], folder: Path, model: Path, chance: random.Random) -> Counter[str]:
    """Take a file of these lines through data, format and tokenize; how many rows ended where.

    Raises AssertionError where one isn't accounted for.
    """
    data, formatted, tokenized = (folder / name for name in ("data", "format", "tokenize"))
    for path in (data, formatted, tokenized):
        path.mkdir(parents=True)
    good = [json.dumps({"question": f"q {n} of {id(batch)}", "answer": f"a {n}"}).encode() for n in range(40)]
    (folder / "rows.jsonl").write_bytes(b"\n".join([*good, *batch]))
    source = Source(path=str(folder / "rows.jsonl"), weight=chance.choice([1.0, 0.5, 2.5]))
    read = fetch_rows.run(RowSettings(sources=[source]), NoInputs(), data, CONTEXT)
    blank = sum(not line.decode().strip() for line in batch)
    assert read["rows"] >= len(good) + len(batch) - blank, f"{read}: of {len(batch)} lines, {blank} of them blank"
    choices = {
        "near_duplicates": chance.choice(["report", "drop"]),
        "overlap": chance.choice(["report", "drop"]),
        "system_prompt": chance.choice([None, "Be kind."]),
        "share": 0.5,
        "max_rejected": 1.0,
        "max_leaked": 1.0,
    }
    formatting.run(format_settings(**choices), formatting.FormatInputs(data), formatted, CONTEXT)
    card = read_json(formatted / "card.json")
    accounted_for(data, formatted, card, read["rows"])
    counts = Counter({name: int(card[name]) for name in ("train", "heldout", "rejected") if name in card})
    counts["lines"], counts["unreadable"] = len(batch), read["unreadable"]
    (folder / "model").mkdir()
    (folder / "model" / "model").symlink_to(model)
    inputs = tokenization.TokenizeInputs(format=formatted, model=folder / "model")
    tokenization.run(TokenizeSettings(max_rejected=1.0), inputs, tokenized, CONTEXT)
    told = read_json(tokenized / "tokenize.json")
    examples = sum(split["examples"] for split in told["counts"].values())
    assert examples + told["rejected_count"] == card["train_rows"] + card["heldout"], f"{told['counts']}: some vanished"
    return counts + Counter({"not tokenised": told["rejected_count"]})


def rows(number: int, folder: Path, seed_: int, end: float, say: Callable[[str], None]) -> Counter[str]:
    """So many rows through the stages, in batches; how many ended where."""
    from tiny import save_tiny_model

    model = save_tiny_model(folder / "tiny")
    counts: Counter[str] = Counter()
    chance = random.Random(seed_)
    while counts["lines"] < number and time.monotonic() < end:
        batch = lines(min(BATCH, number - counts["lines"]), chance.randrange(2**32))
        try:
            counts += rows_through_the_stages(batch, folder / "batch", model, chance)
        except UserError:  # of which no row is of use
            counts += Counter({"lines": len(batch), "of refused sources": len(batch)})
        shutil.rmtree(folder / "batch")
        say(f"rows: {dict(counts)}")
    return counts


class Settings:
    """Random settings by the schema that config/schema.json has."""

    def __init__(self, chance: random.Random):
        self.chance, self.schema = chance, json.loads(settings_docs.schema())

    def any(self, node: dict[str, Any] | None = None, wrong: float = 0.03) -> Any:
        """A value for a place of the schema, a wrong one now and then."""
        chance = self.chance
        if node is None:
            node = self.schema
        if "$ref" in node:
            node = self.schema["$defs"][node["$ref"].rpartition("/")[2]]
        if chance.random() < wrong and node is not self.schema:
            return chance.choice(ODD_VALUES)
        if "anyOf" in node:
            return self.any(chance.choice(node["anyOf"]), wrong)
        for name in ("const", "enum"):
            if name in node:
                return chance.choice(node[name]) if name == "enum" else node[name]
        return getattr(self, f"_{node.get('type', 'null')}")(node, wrong)

    def _null(self, node: dict[str, Any], wrong: float) -> None:
        return None

    def _boolean(self, node: dict[str, Any], wrong: float) -> bool:
        return self.chance.random() < 0.5

    def _integer(self, node: dict[str, Any], wrong: float) -> int:
        low = node.get("minimum", node.get("exclusiveMinimum", 0))
        return self.chance.choice([low, low + 1, low + 7, low - 1 if self.chance.random() < wrong else low + 2])

    def _number(self, node: dict[str, Any], wrong: float) -> float:
        low, high = (
            node.get("minimum", node.get("exclusiveMinimum", 0)),
            node.get("maximum", node.get("exclusiveMaximum", 2)),
        )
        return self.chance.choice([self.chance.uniform(low, high), (low + high) / 2, low, high])

    def _string(self, node: dict[str, Any], wrong: float) -> str:
        return self.chance.choice(
            ["rows.jsonl", "model", "a", "2+2", "a/b", "auto", "https://h/${X}", "0" * 64, "task.yaml"]
        )

    def _array(self, node: dict[str, Any], wrong: float) -> list[Any]:
        least = node.get("minItems", 0)
        return [self.any(node.get("items", {"type": "string"}), wrong) for _ in range(least + self.chance.randrange(3))]

    def _object(self, node: dict[str, Any], wrong: float) -> dict[Any, Any]:
        chance, found = self.chance, {}
        fields = node.get("properties", {})
        for name, inner in fields.items():
            if name in node.get("required", ()) or chance.random() < 0.15:
                found[name] = self.any(inner, wrong)
        if isinstance(extra := node.get("additionalProperties"), dict) or (extra is True):
            inner = extra if isinstance(extra, dict) else {"type": "string"}
            found |= {
                chance.choice(["a", "b", "question", "1"]): self.any(inner, wrong) for _ in range(chance.randrange(3))
            }
        if chance.random() < wrong:
            found[chance.choice(ODD_KEYS)] = chance.choice(ODD_VALUES)
        return found


def sound(chance: random.Random) -> dict[str, Any]:
    """What most random configurations are laid over: a model and rows that are there."""
    sources: list[dict[str, Any]] = [{"path": "rows.jsonl"}, {"builtin": "tickets", "rows": 5}]
    return {"model": {"source": chance.choice(["model", "a/b"])}, "data": {"sources": [chance.choice(sources)]}}


def damaged(text: str, chance: random.Random) -> str:
    """A configuration's text with a few characters others, gone or twice."""
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(text) + 1)
        text = (
            text[:place]
            + chance.choice(["", ":", "\t", "- ", "{", "&a ", "*a", "!!x ", "#", "'", "\x07", "é"])
            + text[place + 1 :]
        )
    return text


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of a configuration's values, down to those of lists."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path


def has(value: Any, path: tuple[Any, ...]) -> bool:
    """Whether there is such a path."""
    for name in path:
        if isinstance(value, collections.abc.Mapping) and name in value:
            value = value[name]
        else:
            return False
    return True


def configurations(number: int, folder: Path, seed_: int, end: float, say: Callable[[str], None]) -> Counter[str]:
    """So many configurations in the working directory `folder`; how many were accepted, and why the others not."""
    from project import write_rows
    from tiny import save_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    chance = random.Random(seed_)
    with contextlib.chdir(folder):
        save_tiny_model(folder / "model")
        write_rows(folder / "rows.jsonl", 5)
        make = Settings(chance)
        while counts.total() < number and time.monotonic() < end:
            config = make.any(wrong=chance.choice([0, 0, 0.03]))
            config = {**config, **(sound(chance) if chance.random() < 0.8 else {})}
            config.pop("runtime", None)
            if chance.random() < 0.7:
                config.pop("runs", None)
            text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
            text = damaged(text, chance) if chance.random() < 0.2 else text
            counts[configuration(text)] += 1
            if counts.total() % 500 == 0:
                say(f"configurations: {dict(counts)}")
    return counts


def configuration(text: str) -> str:
    """Read and resolve one, as the workflow does: "accepted" or "refused"."""
    Path("my.yaml").write_text(text, encoding="utf-8", errors="replace")
    try:
        config = config_file.read("my.yaml")
        runs = stage_graph.runs_of(config)
    except UserError as error:
        said = str(error)
        assert said.strip() and "Traceback" not in said and len(said) < 20_000, said
        return "refused"
    except BaseException as error:
        raise AssertionError(f"ended in {type(error).__name__}: {error}\n{text}") from error
    for run, (chosen, stages) in runs.items():
        dumped = chosen.model_dump(mode="json")
        for path in leaves({name: value for name, value in config.items() if name != "runs"}):
            assert has(dumped, path), f"{path} was taken without a word, and is nowhere in run {run}:\n{text}"
        assert all(json.loads(stage.parameters()) for stage in stages.values())
    return "accepted"


KINDS = {"rows": rows, "configurations": configurations}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND=NUMBER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    wanted = dict(pair.split("=") for pair in asked.kinds) or {"rows": 100_000, "configurations": 10_000}
    for kind, number in wanted.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
            counts = KINDS[kind](int(number), Path(scratch) / "f", asked.seed, began + asked.seconds, lambda text: None)
        print(f"{kind}: {dict(counts)}, seed {asked.seed}; no traceback; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
