"""What follows from declarations, settings and registries outside the package: documentation, a cluster's profile.

`make settings` (the command `adder document`) writes it; each part stands between two marks of its file, or after one.
"""

from collections.abc import Callable
from pathlib import Path

from adder.workflow import card_docs, row_format_docs, score_docs, settings_docs, stage_docs

# Table by the page that it stands in and the name that its marks have.
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("config/README.md", "settings"): settings_docs.tables,
    ("docs/architecture.md", "stages"): stage_docs.table,
    ("docs/data.md", "row formats"): row_format_docs.table,
    ("docs/data.md", "forms"): row_format_docs.forms,
    ("docs/cards.md", "cards"): card_docs.table,
    ("docs/evaluation.md", "scores"): score_docs.table,
}
PROFILE = "profiles/slurm/config.yaml"
PROFILE_MARK = "# From here on made by `make settings`, from the stages' declarations.\n"


def documents(root: Path) -> dict[Path, str]:
    """Each file below the project's directory `root` that has a generated part, with its text as it should be."""
    profile = (root / PROFILE).read_text(encoding="utf-8").partition(PROFILE_MARK)[0]
    return {
        root / "config" / "schema.json": settings_docs.schema(),
        root / PROFILE: profile + PROFILE_MARK + stage_docs.cluster_partitions(),
        **{root / page: _page(root, page) for page, _ in TABLES},
    }


def _page(root: Path, page: str) -> str:
    """A page with all of its tables."""
    text = (root / page).read_text(encoding="utf-8")
    for (where, name), table in TABLES.items():
        text = filled(text, name, table()) if where == page else text
    return text


def filled(page: str, name: str, text: str) -> str:
    """Return `page` with `text` between the two marks called `name`. Raises ValueError for a page without them."""
    begin, end = f"<!-- {name}: begin (made by `make settings`) -->", f"<!-- {name}: end -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no marks {begin} and {end}")
    before, after = page.partition(begin)[0], page.partition(end)[2]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
