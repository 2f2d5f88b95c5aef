"""Numbers as people write them: fractions, percentages, thousands, decimal commas, powers of ten, units.

What isn't wholly a number (a time, a date, a ratio, a range) is none. Light to import.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, NamedTuple

Decimal = Literal["point", "comma"]

GROUPS = r"\d{1,3}(?:{0}\d{{3}})+"  # thousands between this sign
SPACES = "[ \u00a0\u2009\u202f'’]"
PLAIN = re.compile(r"\d+(?:[.,]\d+)?|[.,]\d+")
POWER = re.compile(r"^(.+?)(?:[eE]([+-]?\d+)|\s*(?:[×x*·]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?([+-]?\d+)\}?)$")
FRACTION = re.compile(r"^(?:(\d+)\s+)?(\d+)\s*[/\u2044]\s*(\d+)$")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
LATEX_SIGN = re.compile(r"\\([$%#&_])")
LATEX_SPACE = re.compile(r"\\[,;:! ]|\\(?:left|right)(?![a-zA-Z])|~")
LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SUPERSCRIPT = re.compile(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
CODE = re.compile(r"^(?:us\$|usd|eur|gbp|inr)\s*(?=[-+\d.])", re.IGNORECASE)
VULGAR = {
    "½": " 1/2",
    "⅓": " 1/3",
    "⅔": " 2/3",
    "¼": " 1/4",
    "¾": " 3/4",
    "⅛": " 1/8",
    "⅜": " 3/8",
    "⅝": " 5/8",
    "⅞": " 7/8",
}
CURRENCIES = {
    "$": "$",
    "€": "€",
    "£": "£",
    "¥": "¥",
    "₹": "₹",
    "usd": "$",
    "dollar": "$",
    "eur": "€",
    "euro": "€",
    "gbp": "£",
}
SCALES = {
    **dict.fromkeys(("thousand", "tausend"), 10**3),
    **dict.fromkeys(("million", "millions", "mio", "millionen", "mn"), 10**6),
    **dict.fromkeys(("billion", "billions", "bn", "milliarde", "milliarden"), 10**9),
    **dict.fromkeys(("trillion", "trillions"), 10**12),
    **{"hundred": 100, "dozen": 12},
}
# Letters that stand behind a number as no unit, but as an unknown, i or e; and endings of ordinals.
NO_UNIT = re.compile(r"[abceijnpqrxyzπ](\W.*|\^.*)?|st|nd|rd|th")
WRAPPED = re.compile(r"^(?:\*\*|__|`|\\\(|\\\[|\\boxed\{|=)+\s*|\s*(?:\*\*|__|`|\\\)|\\\]|\})+$")
NUMBER_WORDS = re.compile(r"\d[\d.,]*\d|\d")
# A number, and behind it a unit: letters, signs of degrees and percent, powers such as m² and km/h.
PARTS = re.compile(
    r"^([+\-−–]?)\s*([$€£¥₹]?)\s*([+\-−–]?)\s*(\d.*?|[.,]\d.*?)\s*([%‰°µμ]?[^\W\d_][^\d,;:]*(?:[²³]|\^[23]|(?<=\w)[23])?|[%‰°$€£¥₹])?\.?$"
)
UNIT_WORDS = re.compile(r"^[^\W\d_]")
# What comes to the same unit, by hand as far as people write such.
SAME_UNITS = {
    **dict.fromkeys(("percent", "per cent", "prozent"), "%"),
    **dict.fromkeys(("metres", "meters", "metre", "meter"), "m"),
    **dict.fromkeys(("kilometres", "kilometers", "kilometre", "kilometer"), "km"),
    **dict.fromkeys(("centimetres", "centimeters", "centimetre", "centimeter"), "cm"),
    **dict.fromkeys(("kilograms", "kilogram"), "kg"),
    **dict.fromkeys(("grams", "gram"), "g"),
    **dict.fromkeys(("litres", "liters", "litre", "liter"), "l"),
    **dict.fromkeys(("minutes", "minute", "mins"), "min"),
    **dict.fromkeys(("seconds", "second", "secs", "sec"), "s"),
    **dict.fromkeys(("hours", "hour", "hrs", "hr"), "h"),
    **dict.fromkeys(("degrees", "degree"), "°"),
}


class Quantity(NamedTuple):
    """A number, and the unit behind it as it is compared; "" without one."""

    value: Fraction
    unit: str


def habit(texts: Iterable[str]) -> Decimal:
    """Whether numbers in these texts have a decimal comma or, as where nothing tells, a decimal point."""
    comma = point = 0
    for text in texts:
        for number in NUMBER_WORDS.findall(text):
            last = max(number.rfind(","), number.rfind("."))
            if last < 0 or (number.count(",") + number.count(".") == 1 and len(number) - last - 1 == 3):
                continue  # 1,234 may be either
            signs = number.count(number[last])
            decimal = number[last] if signs == 1 else {",": ".", ".": ","}[number[last]]
            comma, point = comma + (decimal == ","), point + (decimal == ".")
    return "comma" if comma > point else "point"


def parse_quantity(text: str, decimal: Decimal = "point") -> Quantity | None:
    """The number that a text is, with its unit, or None. `decimal`: how an ambiguous 1,234 or 1.234 is read."""
    found = LATEX_FRACTION.sub(lambda part: f" {part[1] or part[2]}/{part[3] or part[4]}", without_latex(text).strip())
    found = SUPERSCRIPT.sub(lambda part: f"10^{part[1].translate(POWERS)}", found)
    found = CODE.sub(lambda part: CURRENCIES.get(part[0].strip().lower(), "$"), found)
    found = re.sub(r"^([-+−–])\s+(?=\d)", r"\1", found)
    for sign, fraction in VULGAR.items():
        found = found.replace(sign, fraction)
    found = WRAPPED.sub("", WRAPPED.sub("", found.strip())).strip()
    if len(found) > 2 and found[0] == found[-1] == "$":  # as LaTeX writes it
        found = found[1:-1].strip()
    parts = PARTS.match(found)
    if not parts:
        return None
    minus, currency, minus_too, number, unit = parts.groups(default="")
    value = _value(number.strip() + unit.rstrip("."), decimal)  # in 5e3 no unit stands behind the 5
    if value is not None:
        unit = ""
    else:
        value = _value(number.strip(), decimal)
    if value is None or (minus and minus_too) or NO_UNIT.fullmatch(unit.strip(" .").lower()):
        return None
    scale, _, rest = unit.strip(" .").partition(" ")
    if scale.lower() in SCALES:
        value, unit = value * SCALES[scale.lower()], rest
    elif unit == "k":
        value, unit = value * 1000, ""
    if (minus or minus_too) and (minus or minus_too) != "+":
        value = -value
    return Quantity(value, _unit(currency or unit.strip()))


def without_latex(text: str) -> str:
    """A text without what LaTeX needs only to set it: `\\text{}`, thin spaces, the backslash before a sign."""
    return LATEX_SIGN.sub(r"\1", LATEX_SPACE.sub(" ", LATEX_TEXT.sub(r"\1", text)))


def same_quantity(one: Quantity, other: Quantity) -> bool:
    """Whether both are one number in one unit. A unit that only one of them names isn't compared; 50 % is also 0.5."""
    if one.unit == other.unit:
        return one.value == other.value
    if one.unit and other.unit:
        return False
    if one.value == other.value:
        return True
    percent, plain = (one, other) if one.unit else (other, one)
    return percent.unit == "%" and percent.value == 100 * plain.value


def _value(text: str, decimal: Decimal) -> Fraction | None:
    if match := FRACTION.match(text):
        whole, top, bottom = match.groups(default="0")
        return Fraction(whole) + Fraction(int(top), int(bottom)) if int(bottom) else None
    if match := POWER.match(text):
        number, power = _value(match[1], decimal), int(match[2] or match[3])
        return None if number is None or abs(power) > 300 else number * Fraction(10) ** power
    plain = _grouped(text, decimal)
    return None if plain is None else Fraction(plain)


def _grouped(text: str, decimal: Decimal) -> str | None:
    """Digits without signs between thousands, with a decimal point; None for what is no number."""
    thousands, point = (",", ".") if decimal == "point" else (".", ",")
    for sign, mark in (
        (re.escape(thousands), re.escape(point)),
        (re.escape(point), re.escape(thousands)),
        (SPACES, "[.,]"),
    ):
        both_ways = sign == re.escape(point)
        # Among thousands of the other habit, one sign alone is that habit's decimal sign: 1.234 and 1.234.567 differ.
        many = rf"\d{{1,3}}(?:{sign}\d{{3}}){{2,}}(?:{mark}\d+)?|\d{{1,3}}{sign}\d{{3}}{mark}\d+"
        if re.fullmatch(many if both_ways else rf"\d{{1,3}}(?:{sign}\d{{3}})+(?:{mark}\d+)?", text):
            whole, found, rest = re.match(rf"(.*?)(?:({mark})(\d+))?$", text).groups(default="")  # pyright: ignore[reportOptionalMemberAccess] - it matches anything
            return re.sub(r"\D", "", whole) + (f".{rest}" if found else "")
    if PLAIN.fullmatch(text):
        return text.replace(",", ".")
    return None


def _unit(text: str) -> str:
    """A unit as it is compared: lower case unless short, in the singular."""
    unit = text.strip(" .")
    low = unit.lower()
    low = SAME_UNITS.get(low, low)
    low = CURRENCIES.get(low, CURRENCIES.get(low.removesuffix("s"), low))
    if len(unit) <= 3 and low == unit.lower():
        return unit  # mm and Mm, kb and kB
    return low.removesuffix("s") if len(low) > 3 else low
