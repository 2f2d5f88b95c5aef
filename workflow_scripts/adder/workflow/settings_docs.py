"""The settings' documentation, made from their model: JSON schema and Markdown tables."""

import json
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from adder.data.stage import Source
from adder.evaluation.tasks.stage import EvaluationTask
from adder.formatting.row_formats import row_format_names
from adder.workflow.settings import Config, section_of

LISTED = {Source: "sources", EvaluationTask: "tasks"}
# What a setting may be, where a registry above its section says it.
REGISTERED: dict[tuple[type[BaseModel], str], tuple[str, ...]] = {(Source, "row_format"): row_format_names()}


def schema() -> str:
    """Return the JSON schema of the YAML file; editors complete and check settings with it."""
    described = Config.model_json_schema()
    for (section, name), values in REGISTERED.items():
        described["$defs"][section.__name__]["properties"][name]["enum"] = list(values)
    return json.dumps(described, indent=2, sort_keys=True) + "\n"


def tables() -> str:
    """Return one Markdown table a section: setting, values, default, meaning."""
    return "\n\n".join(_section_tables(Config, "", set()))


def _section_tables(section: type[BaseModel], prefix: str, listed: set[type[BaseModel] | None]) -> list[str]:
    """The section's own table and those of the sections in it; what several lists hold is shown once."""
    rows, inner = [], []
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        many = "list" in str(field.annotation)
        if nested and nested not in listed:
            inner += _section_tables(nested, f"{prefix}{name}{'[]' if many else ''}.", listed)
        if many:
            listed.add(nested)
        if nested and not many:
            continue
        text = re.sub(r"\s+", " ", field.description or "").replace("|", "\\|")
        registered = REGISTERED.get((section, name))
        values = " or ".join(f"`{value}`" for value in registered) if registered else _values(field)
        rows.append(f"| `{prefix}{name}` | {values} | {_default(field)} | {text} |")
    head = f"### {prefix.rstrip('.') or 'Top level'}\n\n{section.__doc__}\n\n"
    table = head + "| setting | values | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
    return ([table] if rows else []) + inner


def _values(field: Any) -> str:
    return " or ".join(_kinds(field.annotation)) + _bounds(field.metadata)


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return "".join(f", {sign} {getattr(m, name)}" for m in metadata for name, sign in signs.items() if hasattr(m, name))


def _kinds(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *metadata = get_args(annotation)
        constraints = [c for m in metadata for c in getattr(m, "metadata", [m])]
        return [" or ".join(_kinds(kind)) + _bounds(constraints)]
    if origin is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if origin in (Union, types.UnionType):
        return [kind for inner in get_args(annotation) for kind in _kinds(inner)]
    if origin is list:
        inner = get_args(annotation)[0]
        if get_origin(inner) is Literal:
            return [f"list of {', '.join(_kinds(inner))}"]
        return [f"list of {LISTED.get(inner, 'text')}"]
    names = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}
    if origin is dict:
        return ["names" if get_args(annotation) == (str, str) else "settings by name"]
    return [names.get(annotation, "settings")]


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        if not field.default_factory:
            return "must be set"
        return f"`{json.dumps(field.default_factory())}`" if field.default_factory in (list, dict) else ""
    return f"`{json.dumps(field.default)}`"
