"""One self-contained page from a template: styles and script within it, and nothing else that may run."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from adder.report.formatting import FILTERS

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(name: str, view: Mapping[str, object], styles: tuple[str, ...]) -> str:
    """Fill the template `name`.html.jinja, with page.js, `name`.js and the `styles` files in it.

    Everything in `view` is escaped there, but plots, which are marked up already.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(FILTERS)
    style = "".join((TEMPLATES / style).read_text(encoding="utf-8") for style in styles)
    # The page may run this one script and nothing else: text that slipped through unescaped would still do no harm.
    script = "".join((TEMPLATES / own).read_text(encoding="utf-8") for own in ("page.js", f"{name}.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(f"{name}.html.jinja").render(
        view, style=Markup(style), script=Markup(script), digest=digest
    )
