"""The documentation as a site: built strictly, with every page in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="mkdocs-material isn't installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_docs_is_on_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        built = site / place.parent / "index.html" if place.name == "index" else site / place / "index.html"
        assert built.exists(), page


def test_every_page_is_in_the_table_of_contents():
    named = re.findall(r"(?<=[ :])[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages | {"index.md", "settings.md", "contributing.md"} == set(named)


def test_pages_that_stand_elsewhere_are_on_it_with_their_links(site):
    first = (site / "index.html").read_text()
    assert 'href="data/"' in first
    assert (site / "settings" / "index.html").exists()
    assert (site / "contributing" / "index.html").exists()


def test_links_lead_to_pages_of_the_site_or_to_the_web(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # by where a site would be
            continue
        for target in re.findall(r'<a [^>]*href="([^"#]+)', page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            place = (page.parent / target).resolve()
            assert place.exists() or (place / "index.html").exists(), (page, target)


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', page.read_text()), page
