"""A configuration's file, read with one sentence for what is wrong with it as a file; its settings come after."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from adder.core.errors import UserError


def read(file: str | Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file.

    Raises UserError: not there, not YAML or a key twice in one mapping (with line and column), without keys.
    """
    try:
        loader = yaml.SafeLoader(_as_yaml(Path(file).read_text(encoding="utf-8")))
        root = loader.get_single_node()
        _refuse_doubles(file, root)
        content = None if root is None else loader.construct_document(root)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}); give a YAML file with settings") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; give a YAML file with settings") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{file}{at}: not YAML: {problem}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{file}: expected settings by name, such as `model: {{source: …}}`, found {found}")
    return content


def _as_yaml(text: str) -> str:
    """JSON may be indented with tabs, which YAML may not; in its strings there are none."""
    try:
        json.loads(text)
    except ValueError:
        return text
    return text.replace("\t", " ")


def _refuse_doubles(file: str | Path, root: yaml.Node | None) -> None:
    """YAML's reader would take the last of them without a word."""
    for mapping in _mappings(root):
        first = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                raise UserError(
                    f"{file}, line {line}, column {key.start_mark.column + 1}: `{key.value}` stands twice in one "
                    f"section (first on line {first[key.tag, key.value]}); keep one"
                )
            first[key.tag, key.value] = line


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """The mappings below a node, each once however many aliases it has, in the order of the file."""
    ahead, seen = [root], set()
    while ahead:
        node = ahead.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        ahead += reversed(inner)
