"""Take the pictures of a report's first screen that docs/ shows: light, dark and on a phone.

Usage: python tests/pictures.py results/default
"""

import sys
import tempfile
from pathlib import Path

from browser import Browser

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Name, width and height in CSS pixels, whether dark.
PICTURES = (("report", 1200, 800, False), ("report-dark", 1200, 800, True), ("report-phone", 390, 844, False))


def take(run: Path, folder: Path) -> None:
    """Write the pictures of a run's report into a folder."""
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        for name, width, height, dark in PICTURES:
            page = browser.open(run / "report.html", width, height, dark)
            page.screenshot(folder / f"{name}.png", whole=False)
            page.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), DOCS)
