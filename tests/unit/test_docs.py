"""The pages for people name what exists: modules, tests, folders, settings' files, and links that lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "workflow_scripts" / "adder"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Files that the pages tell people to write.
NEW = "workflow_scripts/adder/vocabulary"
EXAMPLES = {"my_rows.py", "polite.py", "tasks/polite.py", f"{NEW}/stage.py", f"{NEW}/run.py"}
MODULES = [path for folder in ("workflow_scripts", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def named(pattern: str) -> set[tuple[str, str]]:
    """(page, what it names) of each match on the pages."""
    return {(page.name, name) for page in PAGES for name in re.findall(pattern, page.read_text())}


def test_modules_on_the_pages_exist():
    for page, name in named(r"(?<![\w*/])(\w[\w/]*\.py)\b"):
        assert name in EXAMPLES or any(f"/{path}".endswith(f"/{name}") for path in MODULES), (page, name)


def test_tests_on_the_pages_exist():
    defined = {name for path in MODULES for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    for page, name in named(r"`(test_\w+)`"):
        assert name in defined, (page, name)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_every_package_has_its_line_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for init in PACKAGE.rglob("*/__init__.py"):
        assert f"`{init.parent.relative_to(PACKAGE)}`" in page, init.parent


def test_what_contributing_shows_is_what_a_test_adds():
    """Each line of its code stands in the test that adds the same stage, row format and score to a copy."""
    added = (ROOT / "tests" / "workflow" / "test_additions.py").read_text().replace("\\\\n", "\\n")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL):
        for line in code.splitlines():
            text = line.partition("  #")[0].strip()
            assert text in added, text
