"""Every setting: its type, default, limits and help text. The one truth behind config/schema.json and config/README.md.

`load` turns the YAML's dictionary into one resolved `Settings` a run, or raises one UserError that lists every mistake.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from adder.core.errors import UserError
from adder.core.secrets import written_out
from adder.core.section import Section
from adder.core.stage_spec import Runtime
from adder.data.model_types import ModelSettings
from adder.data.stage import Data
from adder.evaluation.stage import Evaluate
from adder.export.stage import Export
from adder.formatting.row_formats import row_format_names
from adder.formatting.stage import Format
from adder.merging.stage import Merge
from adder.packing.stage import Lengths
from adder.report.stage import Report, ResolvedSetting
from adder.tokenization.stage import TokenizeSettings
from adder.training.stage import LORA_KEYS, Train

# As pydantic words a bound; it names the one that was passed, and the other would be the next mistake.
BOUNDS = {"gt": "greater than", "ge": "greater than or equal to", "lt": "less than", "le": "less than or equal to"}


class Settings(Section):
    """The settings of one run."""

    model: ModelSettings
    data: Data
    format: Format = Field(default_factory=Format)
    tokenize: TokenizeSettings = Field(default_factory=TokenizeSettings)
    lengths: Lengths = Field(default_factory=Lengths)
    train: Train = Field(default_factory=Train)
    merge: Merge = Field(default_factory=Merge)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    export: Export = Field(default_factory=Export)
    report: Report = Field(default_factory=Report)
    runtime: Runtime = Field(default_factory=Runtime)

    @model_validator(mode="after")
    def _only_qlora_quantises(self) -> "Settings":
        if self.merge.base == "dequantized" and self.train.method != "qlora":
            raise ValueError(
                f"merge.base: dequantized is for train.method: qlora; with {self.train.method} the base isn't quantised"
            )
        return self


class ValidSections:
    """Sections that were valid once, by their text: the thousand runs of a sweep have most of theirs in common."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, str], Section] = {}

    def settings(self, given: dict[str, Any]) -> Settings:
        """Settings of which equal sections are the same objects. Raises ValidationError."""
        names = [*given, *(name for name in Settings.model_fields if name not in given)]
        texts = {name: (name, repr(given[name]) if name in given else "") for name in names}
        known = {name: self.known[text] for name, text in texts.items() if text in self.known}
        made = Settings.model_validate(given | known)
        self.known |= {text: getattr(made, name) for name, text in texts.items()}
        return made


class Config(Settings):
    """The whole YAML file: the settings, and named runs that override some of them."""

    runs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named runs, each with the settings in which it differs; without it there is one run, named `default`."""


def load(config: dict[str, Any]) -> dict[str, Settings]:
    """Return the resolved settings by run name. Raises UserError listing every mistake of every run."""
    _refuse(dict.fromkeys(written_out(config)))  # first, for other mistakes are told with what was found
    base = copy.deepcopy(dict(config))
    runs = base.pop("runs", None) or {"default": {}}
    if not isinstance(runs, dict):
        raise UserError(f"runs: expected names with overrides, found {type(runs).__name__}")
    problems: dict[str, None] = {}  # a mistake in the common part is one mistake, however many runs share it
    loaded, sections = {}, ValidSections()
    for name, override in runs.items():
        problems.update(dict.fromkeys(_name_problems(name)))
        if override is not None and not isinstance(override, dict):
            problems[f"runs.{name}: expected settings, found {override!r}"] = None
            continue
        if override and "runtime" in override:
            problems[f"runs.{name}.runtime: belongs to the machine, not to a run; move it to the top level"] = None
        try:
            loaded[name] = sections.settings(_of_run(base, override or {}))
            problems.update(dict.fromkeys(_unknown_row_formats(loaded[name].data)))
        except ValidationError as error:
            problems.update(dict.fromkeys(_sentences(error.errors(), base, override or {}, name)))
    _refuse(problems)
    return loaded


def _refuse(problems: Mapping[str, None]) -> None:
    if problems:
        raise UserError("the settings have mistakes; nothing was run\n" + "\n".join(f"  - {p}" for p in problems))


def _of_run(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """A run's settings. What the runs have in common of LoRA doesn't concern one that is a full training by itself."""
    result, own = merged(base, override), override.get("train")
    if isinstance(own, dict) and own.get("method") == "full" and isinstance(result["train"], dict):
        result["train"] = {key: value for key, value in result["train"].items() if key in own or key not in LORA_KEYS}
    return result


def merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `override` laid over it; dictionaries merge key by key, anything else is replaced."""
    result = copy.deepcopy(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


Rows = dict[tuple[int, str], list[ResolvedSetting]]
"""Those of a section, by its id and the text of what the run itself sets of it."""


def resolved(settings: Settings, config: dict[str, Any], run: str, known: Rows | None = None) -> list[ResolvedSetting]:
    """List every setting that a run has use for, its origin being "default", "config" or "run".

    known: what was listed of other runs of the same configuration, which is added to.
    """
    override = (config.get("runs") or {}).get(run) or {}
    known = {} if known is None else known
    unused = {f"train.{key}" for key in LORA_KEYS} if settings.train.method == "full" else set[str]()
    rows: list[ResolvedSetting] = []
    for name in Settings.model_fields:
        section = getattr(settings, name)
        key = (id(section), repr(override.get(name)))
        if key not in known:
            known[key] = _of_section(name, section, override, config)
        rows += known[key]
    return [row for row in rows if row.key not in unused]


def _of_section(name: str, section: Section, override: dict[str, Any], config: dict[str, Any]) -> list[ResolvedSetting]:
    rows = []
    for key, value in _leaves({name: section.model_dump(mode="json")}):
        path = key.split(".")
        origin = "run" if _has(override, path) else "config" if _has(config, path) else "default"
        rows.append(ResolvedSetting(key=key, value=value, origin=origin))
    return rows


def _leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        pairs += _leaves(inner, f"{name}.") if isinstance(inner, dict) else [(name, inner)]
    return pairs


def _has(config: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


# What is in the directory of results beside the runs.
BESIDE_RUNS = (
    "stages", "cache", "logs", "checkpoints", "benchmarks", "tensorboard", "compare.html", "compare.csv"
)  # fmt: skip
# File systems allow 255 bytes, and names of files are made of it.
LONGEST_NAME = 150


def _name_problems(name: Any) -> list[str]:
    text = str(name)
    if not isinstance(name, str):
        written = {True: "on, yes or true", False: "off, no or false", None: "null or nothing"}
        found = written[name] if name is None or isinstance(name, bool) else text
        kinds = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
        kind = kinds.get(type(name), type(name).__name__)
        return [
            f"runs.{text}: YAML reads the name {found} as {kind}, and a run's name is text; put it in quotes or choose "
            "another"
        ]
    if text in BESIDE_RUNS:
        return [f"runs.{text}: results/{text} is where something else is kept; choose another name"]
    if (length := len(text.encode(errors="replace"))) > LONGEST_NAME:
        what = f"{length} bytes are too many, {LONGEST_NAME} are allowed"
        return [f"runs.{text[:30]}…: a run's name is a directory's name; {what}"]
    if text and all(c.isalnum() or c in "-_." for c in text) and not text.startswith("."):
        return []
    return [f"runs.{text}: a run's name is a directory's name; letters, digits, '-', '_' and '.' are allowed"]


def _unknown_row_formats(data: Data) -> list[str]:
    """One line a source whose `row_format` is not registered in formatting.row_formats."""
    groups = {"sources": data.sources, "heldout.sources": data.heldout.sources or [], "tests": data.tests}
    *names, last = (repr(name) for name in row_format_names())
    return [
        f"data.{where}.{number}.row_format: should be {', '.join(names)} or {last} (found {source.row_format!r})"
        for where, sources in groups.items()
        for number, source in enumerate(sources)
        if source.row_format not in row_format_names()
    ]


def _sentences(
    errors: Sequence[Mapping[str, Any]], base: dict[str, Any], override: dict[str, Any], run: str
) -> list[str]:
    """One line a mistake. Pydantic reports each branch of a union ("auto" or a number) apart: they are one mistake."""
    by_path: dict[tuple, list[Mapping[str, Any]]] = {}
    for error in errors:
        by_path.setdefault(tuple(part for part in error["loc"] if not _is_type_name(part)), []).append(error)
    return [_sentence(list(path), group, base, override, run) for path, group in by_path.items()]


def _sentence(
    path: list[Any], errors: list[Mapping[str, Any]], base: dict[str, Any], override: dict[str, Any], run: str
) -> str:
    """The key's path, what is wrong, what was found, the nearest valid name."""
    error = errors[0]
    names = [str(part) for part in path]
    in_run = _has(override, names) or (error["type"] == "value_error" and _has(override, names[:1]))
    where = ".".join((["runs", run] if in_run else []) + names) or "settings"
    if error["type"] == "extra_forbidden":
        section = _section(path[:-1])
        names = sorted(section.model_fields) if section else []
        written = str(path[-1])
        near = [name for name in names if "".join(word[0] for word in name.split("_")) == written]  # lr
        near += difflib.get_close_matches(written, names, n=1, cutoff=0.5) or _elsewhere(written)
        hint = f"did you mean `{near[0]}`?" if near else f"allowed here: {', '.join(names)}"
        return f"{where}: unknown setting; {hint}"
    if error["type"] == "missing":
        return f"{where}: must be set"
    if error["type"] == "model_type" and (section := _section(path)):
        return f"{where}: has settings of its own ({', '.join(section.model_fields)}), found {error.get('input')!r}"
    message = " or ".join(one["msg"].removeprefix("Value error, ") for one in errors)
    message = message.replace("or Input should be", "or").replace("Input should be", "should be")
    message = message.split(", unable to parse")[0]
    if len(errors) == 1 and any(words in message for words in BOUNDS.values()):
        message = f"should be {_bounds(path)}" if _bounds(path) else message
    found = error.get("input")
    if not path:  # of two sections, which the message names
        return message
    return f"{where}: {message}" + ("" if isinstance(found, dict | list) else f" (found {found!r})")


def _bounds(path: list[Any]) -> str:
    """All bounds of a number, as `greater than 0 and less than 1`; "" where it has none of its own."""
    section = _section(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    limits = field.metadata if field else []
    return " and ".join(
        f"{words} {getattr(limit, name)}" for limit in limits for name, words in BOUNDS.items() if hasattr(limit, name)
    )


def _is_type_name(part: Any) -> bool:
    """Pydantic adds the branch of a union to the path (`literal['auto']`, `int`): no key of ours."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-", "list[")) or part in {"int", "float"}
    )


def _elsewhere(name: str) -> list[str]:
    """Where else the settings have a key of this name, as `train.max_examples`."""
    sections = ((top, section_of(field.annotation)) for top, field in Settings.model_fields.items())
    return [f"{top}.{name}" for top, section in sections if section and name in section.model_fields]


def _section(path: list[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Settings
    for part in path:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = section_of(section.model_fields[part].annotation)
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the Section inside an annotation such as `Heldout`, `list[Source]` or `list[Source] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, UnionType) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)
