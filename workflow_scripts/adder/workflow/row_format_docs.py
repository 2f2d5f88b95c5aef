"""The table of row formats in docs/data.md, made from their registry."""

from adder.formatting.row_formats import ROW_FORMATS


def table() -> str:
    """Return a Markdown table of all row formats, in the order in which they are looked for: name, columns."""
    rows = [f"| `{name}` | {form.meaning} |" for name, form in ROW_FORMATS.items()]
    return "| format | columns |\n|---|---|\n" + "\n".join(rows)
