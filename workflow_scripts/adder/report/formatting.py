"""Numbers as people read them: sensible digits, units, one way everywhere in the report."""

import json
import math
import re
from typing import Any

NO_BREAK = "\u00a0"
GIST = 160  # characters of a text that stand for it
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Columns of the candidate tables, in the order in which they are read.
HEADINGS = {
    "max_seq_length": "length",
    "micro_batch_size": "micro-batch",
    "share_whole": "kept whole",
    "examples_truncated": "examples cut",
    "labelled_tokens_lost": "loss-bearing tokens lost",
    "labelled_share_lost": "share of them",
    "padding_waste": "waste if padded",
    "packs": "packs",
    "examples_per_pack": "examples a pack",
    "packing_waste": "waste if packed",
    "attention_share": "attention's share of the work",
    "products": "products",
    "loss": "loss",
    "loss_difference": "difference",
    "loss_difference_share": "share of the loss",
    "gradient_cosine": "cosine of the gradients",
    "gradient_norm_ratio": "ratio of their norms",
    "lowest_cosine": "lowest by kind of layer",
    "lowest_layer": "which",
    "within": "within what is allowed",
}


def number(value: float | None) -> str:
    """Three significant digits; thousands separated; powers of ten below a thousandth."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0 or (float(value).is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}".replace("-", "−")
    size_of = abs(value)
    if size_of >= 100:
        text = f"{value:,.0f}"
    elif size_of >= 0.001:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size_of)))}f}"
        text = text.rstrip("0").rstrip(".") if size_of < 0.1 else text
    else:
        digits, power = f"{value:.2e}".split("e")
        digits = digits.rstrip("0").rstrip(".")
        text = f"{digits}×10{str(int(power)).translate(SUPERSCRIPTS)}"
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, such as "91.5 %"."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value * 100:.{digits}f}{NO_BREAK}%"


def duration(seconds: float | None) -> str:
    """Seconds as "0.9 s", "5 min 43 s" or "2 h 05 min"."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}{NO_BREAK}s" if seconds < 10 else f"{seconds:.0f}{NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{NO_BREAK}h {minutes:02d}{NO_BREAK}min"
    return f"{minutes}{NO_BREAK}min {rest:02d}{NO_BREAK}s"


def size(count: float | None) -> str:
    """Bytes as "2.41 GB" (powers of 1000)."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g}{NO_BREAK}{unit}"
        count /= 1000
    return f"{count:.3g}{NO_BREAK}TB"


def energy(joules: float | None) -> str:
    """Joules as "420 J", "3.2 Wh" or "1.25 kWh"."""
    if joules is None:
        return "–"
    hours = joules / 3600
    if joules < 1000:
        return f"{joules:.3g}{NO_BREAK}J"
    return f"{hours:.3g}{NO_BREAK}Wh" if hours < 1000 else f"{hours / 1000:,.2f}{NO_BREAK}kWh"


def setting(value: Any) -> str:
    """A setting as one would write it in the YAML file."""
    if isinstance(value, list):  # what a source leaves open says nothing
        value = [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)


def in_words(value: Any) -> str:
    """A setting's value for people to compare: of a list its members, of one with parts those that are set, of a number
    six digits at most.
    """
    if isinstance(value, dict):
        value = [f"{name} {in_words(part)}" for name, part in value.items() if part not in (None, [], {})]
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else setting(value)


def cell(pair: tuple[str, Any]) -> str:
    """A value in a table, written by what its column's name says it is."""
    name, value = pair
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if "waste" in name or "share" in name:
            return percent(value)
        if name.endswith("bytes"):
            return size(value)
        return number(value)
    return setting(value)


def heading(name: str) -> str:
    """A column's heading from a key."""
    return HEADINGS.get(name, name.replace("_", " "))


def clip(text: str, most: int) -> str:
    """The text, cut where it is longer than anyone would read here, with a word on what is left out."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[:most]} … ({left_out:,} more characters)"


def gist(text: str) -> str:
    """The beginning of a text, in one line."""
    return " ".join(text.split())[:GIST]


def short(digest: str | None) -> str:
    """The first twelve digits of a digest."""
    return digest[:12] if digest else "–"


def prose(text: str) -> str:
    """Text that a stage wrote, set as the figures beside it are: minus signs, and no line between number and "%"."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", text or "").replace(" %", f"{NO_BREAK}%")


def sentence(text: str) -> str:
    """A reason as a sentence of its own: a capital unless it begins with a key's name, and a full stop."""
    text = prose(text).strip()
    first = text.split(" ")[0]
    if text and "_" not in first and "." not in first:
        text = text[0].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else text + "."


def moment(text: str) -> str:
    """An ISO time to the minute."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d)?(\.\d+)?(Z|\+00:00)$", r"\1 \2 UTC", text or "")


FILTERS = {
    "number": number, "percent": percent, "duration": duration, "size": size, "energy": energy, "setting": setting,
    "cell": cell, "short": short, "heading": heading, "moment": moment,
    "sentence": sentence, "prose": prose,
}  # fmt: skip


# What is a file or folder of this machine: an absolute path, one from home or from here, or one of Windows.
LOCAL_PATH = re.compile(r"(?<![\w:/.])(?:~?/|\.{1,2}/|[A-Za-z]:\\)[^\s,;:|`'\")\]]+")


def public(value: object) -> str:
    """A text in which local paths are just the names of what they lead to: for what is uploaded."""
    return LOCAL_PATH.sub(lambda path: re.split(r"[/\\]", path.group().rstrip("/\\"))[-1] or "…", str(value))
