"""Generated documentation is that of the declarations, and is put between its marks only."""

from pathlib import Path

import pytest

from adder.workflow.generated_docs import documents, filled

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_what_is_in_the_project_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == documents(ROOT)[path], "run `make settings`"


def test_only_what_stands_between_the_marks_changes():
    page = "Before.\n<!-- x: begin (made by `make settings`) -->\nold\n<!-- x: end -->\nAfter.\n"
    found = filled(page, "x", "new")
    assert found.startswith("Before.\n") and found.endswith("<!-- x: end -->\nAfter.\n")
    assert "\n\nnew\n\n" in found and "old" not in found and filled(found, "x", "new") == found


def test_a_page_without_marks_is_no_place_for_it():
    with pytest.raises(ValueError, match="has no marks <!-- x: begin"):
        filled("Before.", "x", "new")
