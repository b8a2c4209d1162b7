r"""Plain numbers, read exactly: most answers, and the reason that most verdicts need no computer algebra.

An integer, a decimal, a fraction or a power of ten times a decimal, as rewards.normalize spells them.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 1000
"""A larger power of ten is left to computer algebra, which runs under a limit."""
DOUBLE_DIGITS = 15
"""Significant digits from which a decimal counts as its rounding: what a double precision number prints."""

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
    """A number as it was written."""

    value: Fraction
    decimals: int | None = None
    """Digits after the point; None of a number that was written without a point"""
    commas: bool = False
    """Written with commas between its thousands; it may as well be a list"""


def read_number(text: str) -> Number | None:
    """The number that a normalised answer is; None if it is something else."""
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
    """Exactly, but for a decimal of DOUBLE_DIGITS digits or more that is a fraction's rounding."""
    return a.value == b.value or rounds_to(a, b.value) or rounds_to(b, a.value)


def rounds_to(number: Number, value: Fraction) -> bool:
    """Whether a decimal with as many digits as a double is `value` to less than one in its last digit."""
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
