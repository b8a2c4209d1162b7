r"""Reads plain numbers exactly, and quantities: a value and its unit.

A number is an integer, a decimal, a fraction, or one of these times a power of ten, normalized by
rewards.normalize. Most answers are numbers, so most comparisons need no computer algebra. A unit may be a
word, a sign or \text{...}.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 1000
"""A larger power of ten is left to computer algebra, whose time is limited"""
DOUBLE_DIGITS = 15
"""Significant digits from which a decimal may be a rounded value: those of a double"""

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*
    (?: \\frac\s*\{{\s*(?P<inner>-?)\s*(?P<over>\d+)\s*\}}\s*\{{\s*(?P<under>\d+)\s*\}}
      | (?P<left>{_DECIMAL})\s*/\s*(?P<right>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})
    )
    (?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d+)\s*\}}|(?P<digit>\d)))?""",
    re.VERBOSE,
)
_POWER = re.compile(r"(?P<sign>-?)\s*10\s*\^\s*(?:\{\s*(?P<power>[-+]?\d+)\s*\}|(?P<digit>\d))")


@dataclass(frozen=True)
class Number:
    """A number, with how it was written."""

    value: Fraction
    decimals: int | None = None
    """Digits after the point; None if it was written without a point"""
    commas: bool = False
    """Written with commas between thousands, so it may also be a list"""


def read_number(text: str) -> Number | None:
    """Parses a normalized answer that is a plain number; returns None for any other."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and "," not in text and ")" not in text[:-1]:
        text = text[1:-1].strip()
    match = _NUMBER.fullmatch(text) or _POWER.fullmatch(text)
    if not match:
        return None
    part = match.groupdict()
    power = int(part["power"] or part["digit"] or 0)
    if abs(power) > MAX_EXPONENT:
        return None
    value = _unscaled(part)
    if value is None:
        return None
    sign = -1 if (part["sign"] == "-") != (part.get("inner") == "-") else 1
    decimal = part.get("decimal") or ""
    decimals = len(decimal.partition(".")[2]) - power if "." in decimal else None
    return Number(sign * value * Fraction(10) ** power, decimals, "," in text)


def equal(a: Number, b: Number) -> bool:
    """Compares exactly; a decimal of DOUBLE_DIGITS digits or more also equals the value that it rounds."""
    return a.value == b.value or rounds_to(a, b.value) or rounds_to(b, a.value)


def rounds_to(number: Number, value: Fraction) -> bool:
    """Returns whether a decimal with as many digits as a double rounds `value`, up or down."""
    if number.decimals is None or number.decimals <= 0:
        return False
    scaled, exact = number.value * 10**number.decimals, value * 10**number.decimals
    return abs(scaled) >= 10 ** (DOUBLE_DIGITS - 1) and abs(scaled - exact) < 1


def _unscaled(part: dict[str, str | None]) -> Fraction | None:
    if part.get("decimal"):
        return _fraction(part["decimal"])
    if part.get("over"):
        over, under = Fraction(int(part["over"] or 0)), Fraction(int(part["under"] or 0))
    elif part.get("left"):
        over, under = _fraction(part["left"]), _fraction(part["right"])
    else:
        return Fraction(1)  # a bare power of ten
    return over / under if under else None


def _fraction(decimal: str | None) -> Fraction:
    return Fraction((decimal or "0").replace(",", "").rstrip(".") or 0)


_SPELLINGS = {
    "%": "percent percents percentage pct",
    "degree": "degrees deg degs",
    "dollar": "dollars usd $ bucks us-dollars",
    "cent": "cents ¢",
    "euro": "euros eur €",
    "pound-sterling": "gbp £",
    "yen": "jpy ¥",
    "rupee": "rupees inr rs ₹",
    "hour": "hours hr hrs h",
    "minute": "minutes min mins",
    "second": "seconds sec secs s",
    "day": "days",
    "week": "weeks wk wks",
    "month": "months mo",
    "year": "years yr yrs",
    "foot": "feet ft",
    "inch": "inches in in.",
    "yard": "yards yd yds",
    "mile": "miles mi",
    "meter": "meters metre metres m",
    "centimeter": "centimeters centimetre centimetres cm cms",
    "millimeter": "millimeters millimetre millimetres mm",
    "kilometer": "kilometers kilometre kilometres km kms",
    "gram": "grams gramme grammes g",
    "kilogram": "kilograms kg kgs",
    "milligram": "milligrams mg",
    "pound": "pounds lb lbs",
    "ounce": "ounces oz",
    "liter": "liters litre litres l",
    "milliliter": "milliliters millilitre millilitres ml",
    "gallon": "gallons gal",
    "quart": "quarts qt",
    "cup": "cups",
    "mile per hour": "mph",
    "radian": "radians rad",
    "unit": "units",
    "am": "",
    "pm": "",
    "people": "persons person",
    "acre": "acres",
    "ton": "tons tonne tonnes",
    "pint": "pints",
    "tablespoon": "tablespoons tbsp",
    "teaspoon": "teaspoons tsp",
    "kelvin": "kelvins",
    "celsius": "",
    "fahrenheit": "",
    "newton": "newtons",
    "joule": "joules",
    "watt": "watts",
    "volt": "volts",
    "ohm": "ohms",
    "ampere": "amperes amps amp",
    "hertz": "hz",
    "mole": "moles mol",
    "penny": "pennies pence",
    **dict.fromkeys(("men", "women", "children", "mice", "fish", "sheep", "dice", "geese", "teeth"), ""),
}
UNITS = {name: unit for unit, names in _SPELLINGS.items() for name in [unit, *names.split()]}
"""Unit by each of its spellings"""
_COMPOUND = {
    *("hour", "minute", "second", "day", "week", "month", "year", "foot", "inch", "yard", "mile", "degree"),
    *("meter", "centimeter", "kilometer", "gram", "kilogram", "pound", "ounce", "liter", "milliliter"),
    *("dollar", "cent", "gallon", "quart", "cup"),
}
"""Units that occur in compounds: 5 feet 6 inches"""
_NO_UNIT = {
    *("and", "or", "is", "isn't", "not", "no", "never", "but", "if", "for", "to", "than", "more", "less"),
    *("least", "most", "otherwise", "where", "when", "with", "wrong", "false", "incorrect", "mod", "base"),
    *("times", "plus", "minus", "sin", "cos", "tan", "log", "frac", "sqrt", "pi"),
    *("was", "has", "does", "equals", "exceeds", "divides", "remains", "becomes", "gives", "means", "fails"),
    *("thus", "perhaps", "always", "sometimes", "besides", "unless", "versus", "vs", "across", "yes", "this"),
    *("its", "fewer", "extra", "above", "below", "under", "over", "before", "after", "past", "ago", "until"),
    *("zero", "one", "ones", "two", "twos", "three", "threes", "four", "fours", "five", "fives", "six"),
    *("sixes", "seven", "sevens", "eight", "eights", "nine", "nines", "ten", "tens", "dozen", "dozens"),
    *("score", "scores", "gross", "half", "halves", "third", "thirds"),
    *("quarter", "quarters", "twice", "double", "doubles", "triple", "triples", "squared", "cubed"),
    *("hundreds", "thousands", "millions", "billions", "trillions", "twenties", "thirties"),
    *("out", "from", "by", "as", "at", "since", "because", "while", "every", "any", "none"),
    *("negative", "almost", "nearly", "factorial", "factorials", "percentile"),
}
"""Words after a value that change it, as a unit does not, or are a number themselves"""
_ORDINAL = re.compile(
    r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|[a-z]+illion)ths?"
)
"""Names of fractions: 5 hundredths"""
_UNIT_POWER = r"\s*\^\s*\{?\s*(?P<power>[2-9])\s*\}?"
_TAIL = re.compile(
    rf"(?P<word>%|\$|\\\$|[€£¥₹¢]|\\text\{{\s*[a-zA-Z]\s*\}}|(?<![a-zA-Z\\])[a-zA-Z][a-zA-Z.'-]*)(?:{_UNIT_POWER})?\s*$"
)
_CURRENCY = re.compile(
    r"(-?)\s*(?:(\\?\$|[€£¥₹])|(USD|EUR|GBP|Rs\.?|US\\?\$)(?=[\s\d]))\s*(?=[-\d.\\(])(.*)", re.DOTALL
)


@dataclass(frozen=True)
class Quantity:
    """A value and its unit."""

    value: str
    unit: str
    """In one spelling; empty if there is none"""


def read_quantity(text: str) -> Quantity | None:
    """Returns value and unit of a normalized answer; None if it has no unit."""
    if (currency := _CURRENCY.fullmatch(text)) and "$" not in currency[4]:
        sign = (currency[2] or currency[3]).replace("\\", "").replace("US$", "$").lower().rstrip(".")
        inner = read_quantity(currency[4])
        value, unit = (inner.value, inner.unit) if inner else (currency[4], UNITS[sign])
        return Quantity(f"{currency[1]}{value}", unit)
    rest, words = text, []
    while tail := _TAIL.search(rest):
        word = re.sub(r"\\text\{\s*(\w)\s*\}|\\", r"\1", tail["word"]).lower().replace(".", "")
        before = rest[: tail.start()]
        if any(part in _NO_UNIT or _ORDINAL.fullmatch(part) for part in word.split("-")):
            return None
        if not _is_unit(word, tail["word"], before, bool(words)):
            break
        words.append(UNITS.get(word, _singular(word)) + (f"^{tail['power']}" if tail["power"] else ""))
        rest = before.rstrip()
        while rest.endswith(("/", "-")) and words:
            rest, words = rest[:-1].rstrip(), [*words, "per"]
    rest = rest.strip()
    if (
        words
        and words[-1] == "per"
        or not words
        or not rest
        or not re.search(r"[\d})a-zA-Z]$", rest)
        or not re.search(r"\d|\\pi|\\sqrt", rest)
    ):
        return None
    return Quantity(rest, _unit(words[::-1]))


def read_compound(text: str) -> list[Quantity] | None:
    """Returns the parts of a compound such as 5 feet 6 inches; None if the answer is not one."""
    number = r"-?(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|\d+/\d+)"
    unit = r"\\text\{\s*[a-zA-Z]\s*\}|[a-zA-Z]+\.?"
    part = rf"({number})\s*({unit})"
    if not re.fullmatch(rf"{part}(?:\s*(?:,|and|,\s*and)?\s*{part})+", text):
        return None
    parts = [(value, re.sub(r"\\text\{\s*(\w)\s*\}", r"\1", name)) for value, name in re.findall(part, text)]
    known = [(value, UNITS.get(name.lower().rstrip("."))) for value, name in parts]
    if not all(name in _COMPOUND for _, name in known):
        return None
    return [Quantity(value, str(name)) for value, name in known]


def _is_unit(word: str, written: str, before: str, described: bool) -> bool:
    """Returns whether a word is a unit: a sign, a known unit, a plural, or any word next to another unit.

    described: a unit follows. An unknown word that is not a plural is not a unit: 5 dozen, 5 squared and 5
    below are not 5. Few single letters are units: 5 m, but not 5x.
    """
    if written.startswith("\\text") or not word[0].isalpha():
        return True
    if len(word) == 1:
        length = word in "mghsl" and before.endswith(" ") and read_number(before) is not None
        return length or bool(re.search(r"[a-zA-Z]/$", before))
    if word in UNITS or word in ("sq", "square", "cubic", "cu", "per", "of", "each"):
        return True
    plural = word.endswith("s") and not word.endswith("ss") or before.strip() == "1"
    described = described or bool(re.search(r"(?<![a-zA-Z])(?:of|per|/)\s*$", before))
    return len(word) > 2 and (plural or described) and bool(re.search(r"[\s})/]$", before))


def _singular(word: str) -> str:
    for ending, single in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(ending):
            return word.removesuffix(ending) + single
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _unit(words: list[str]) -> str:
    """Joins the words of a unit; square meter becomes meter^2."""
    text = " ".join(words)
    text = re.sub(r"(?:^|(?<= ))(?:square|sq) (\S+)", r"\1^2", text)
    return re.sub(r"(?:^|(?<= ))(?:cubic|cu) (\S+)", r"\1^3", text)
