"""A configuration's file, read with one sentence for what is wrong with it as a file; its settings come after."""

from pathlib import Path

import yaml

from adder.errors import UserError


def read(file: str | Path) -> dict:
    """The keys of a YAML (or JSON) file. Raises UserError: not there, not YAML (with line and column), without keys."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
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
