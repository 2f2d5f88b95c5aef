"""The table of row formats in docs/data.md, made from their registry."""

from adder.formatting.row_formats import ROW_FORMATS

BEGIN, END = "<!-- row formats: begin (made by `make settings`) -->", "<!-- row formats: end -->"


def filled(page: str) -> str:
    """Return `page` with its table of row formats made anew between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def table() -> str:
    """Return a Markdown table of all row formats, in the order in which they are looked for: name, columns."""
    rows = [f"| `{name}` | {form.meaning} |" for name, form in ROW_FORMATS.items()]
    return "| format | columns |\n|---|---|\n" + "\n".join(rows)
