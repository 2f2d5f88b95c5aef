"""The report's view of how long examples are, and what max_seq_length and packing follow from it."""

from adder.report import plots
from adder.report.formatting import number, percent
from adder.report.page_section import PageSection, RunReport, View
from adder.report.sections.choices_section import table


def view(run: RunReport) -> View:
    """The length decision: histogram with the chosen length, what each candidate would cost, the sentences."""
    lengths = run.facts.lengths
    choice, packing = lengths["max_seq_length"], lengths["packing"]
    histogram, cut = lengths["histogram"], lengths["truncation"]
    label = f"Histogram of example lengths in tokens with max_seq_length {choice['value']}"
    packed = lengths["examples_per_pack"] if packing["value"] else None
    spread = f"{number(packed)} examples a pack" if packed else "one example a sequence"
    figures = [
        ("max_seq_length", f"{choice['value']:,}", "tokens"),
        ("packing", "on" if packing["value"] else "off", spread),
        ("Sequences", f"{lengths['packs']:,}", f"from {lengths['examples']:,} examples"),
        ("Fill", percent(lengths["fill"]), "of the positions hold a token"),
        ("Truncation", cut["mode"], f"costs {percent(cut['share'], 2)} of the loss-bearing tokens"),
    ]
    return {
        "figures": figures,
        "tokens": lengths["tokens"],
        "plot": plots.histogram(
            histogram["edges"],
            histogram["counts"],
            choice["value"],
            label,
            "tokens",
            [row["max_seq_length"] for row in choice["alternatives"]],
        ),
        "truncation": cut,
        "choice": choice,
        "packing": packing,
        "table": table(choice["alternatives"], "max_seq_length", choice["value"]),
    }


SECTION = PageSection(name="lengths", anchor="lengths", title="Lengths", view=view)
