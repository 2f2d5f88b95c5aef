"""What the site (mkdocs.yml) needs beyond docs/: pages that live elsewhere, and links to files that it doesn't have."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site that stand elsewhere in the project, by where they stand.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "config/README.md": "settings.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of ELSEWHERE."""
    for source, page in ELSEWHERE.items():
        text = _rewritten((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/."""
    name = page.file.src_uri
    return markdown if name in ELSEWHERE.values() else _rewritten(markdown, f"docs/{name}", name)


def _rewritten(text: str, source: str, page: str) -> str:
    """A page's links as the site has them: to its own pages, and plain text for other files of the project.

    source: where the page stands in the project. page: where it stands on the site.
    """

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match.groups(default="")
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = ELSEWHERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None:
            return f"{label} (`{path}`)" if path not in label else f"`{path}`"
        return f"[{label}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\[([^\]\[]*)\]\(([^)#\s]*)(#[\w-]*)?\)", link, text)
