"""Compares two answers by computer algebra: by value to hundreds of digits, else by math-verify.

Its time is not bounded: call it only in a process that may be killed (rewards.worker).
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_bicc.rewards.quantities import DOUBLE_DIGITS, read_number, rounds_to

_TOKEN = re.compile(
    r"""\\(?:text|begin|end|mathbb|operatorname)\s*\{[^{}]*\}
    | (?P<marked>
        \\(?:vec|d?dot|(?:wide)?(?:hat|tilde)|bar|overline|underline|over(?:right|left)arrow)
        (?:\s*\{\s*\\?[a-zA-Z]+(?:_(?:\{\w*\}|\w))?\s*\}|\s+\\?[a-zA-Z])(?:_(?:\{\w*\}|\w))?'*
      | (?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\{\w*\}|\w))?'+
      | [a-zA-Z]\^\{\s*-\s*1\s*\}(?=\s*\()
      | [a-zA-Z]\^\{\s*\(\s*\w+\s*\)\s*\})
    | (?P<greek>\\(?i:gamma|delta|theta|lambda|xi|pi|sigma|upsilon|phi|psi|omega))
        (?![a-zA-Z])
    | \\[a-zA-Z]+
    | (?P<letter>[a-zA-Z])(?P<below>_(?:\{\w*\}|\w))?""",
    re.VERBOSE,
)
r"""Matches a symbol with a mark (\vec a, y', f^{-1}(x), f^{(2)}), a command, or a letter and its subscript"""
DIGITS = 400
"""Digits to which values are compared; math-verify compares 15, and calls 10^-20 and 10^-21 equal"""


def equal(a: str, b: str) -> bool:
    """Returns whether two answers, normalized by rewards.normalize, are mathematically equal."""
    from math_verify import verify

    a, b = _distinct(a, b)
    x, y = _parsed(a), _parsed(b)
    if _is_rounding(a, y) or _is_rounding(b, x):
        return True
    if _differ(x, y):  # much faster than math-verify, which first tries every simplification
        return False
    # math-verify is not symmetric in its arguments, but the verdict must be
    sets = {"allow_set_relation_comp": True, "timeout_seconds": None}
    return verify(y, x, **sets) or verify(x, y, **sets)


def _distinct(a: str, b: str) -> tuple[str, str]:
    r"""Returns the answers with unique names for symbols that math-verify would confuse.

    It reads X as x, and ignores accents, primes and the difference between f^{-1}(x) and 1/f(x).
    """
    letters = {m["letter"] for text in (a, b) for m in _TOKEN.finditer(text) if m["letter"]}
    below = {c for text in (a, b) for m in _TOKEN.finditer(text) for c in m["below"] or "" if c.isalpha()}
    greek = {m["greek"] for text in (a, b) for m in _TOKEN.finditer(text) if m["greek"]}
    upper = {s for names in (letters | below, greek) for s in names if s != s.lower() and s.lower() in names}
    names: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        symbols = {match["greek"]} if match["greek"] else set(match[0]) if match["letter"] else set()
        if not match["marked"] and not upper & symbols:
            return match[0]
        key = re.sub(r"[\s{}]", "", match[0])
        return names.setdefault(key, f"z_{{{9001 + len(names)}}}") + " "

    return _TOKEN.sub(renamed, a), _TOKEN.sub(renamed, b)


def understood(text: str) -> bool:
    """Returns whether an answer reads as mathematics; evaluates it, to find one too slow to compare."""
    from sympy import Basic, Integer, MatrixBase

    parsed = _parsed(text)
    _differ(parsed, [Integer(0)])
    return any(isinstance(each, Basic | MatrixBase) for each in parsed)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is disabled
    # a decimal becomes a fraction: computer algebra would round it to a double
    exact = re.sub(r"(?<![\w.}])(\d*)\.(\d+)(?![\d.])", _fraction, text)
    # units are read before (rewards.quantities); math-verify would read the h of pi r^2 h as one
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    latex = LatexExtractionConfig(normalization_config=normalization)
    return parse(f"\\boxed{{{exact}}}", [latex], parsing_timeout=None)


def _fraction(match: re.Match[str]) -> str:
    value = Fraction(int(match[1] + match[2]), 10 ** len(match[2]))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _is_rounding(text: str, parsed: list[Any]) -> bool:
    """Returns whether a text is a decimal with as many digits as a double that rounds the parsed value."""
    from sympy import Expr

    number = read_number(text)
    if number is None or number.decimals is None or not parsed or not isinstance(parsed[0], Expr):
        return False
    value = _evaluated(parsed[0], {})
    if value is None or not value.is_real:
        return False
    return rounds_to(number, Fraction(str(value.evalf(DIGITS)))) if abs(value) < 10**DOUBLE_DIGITS else False


def _differ(x: list[Any], y: list[Any]) -> bool:
    """Returns whether two expressions differ within DIGITS - 10 digits, at fixed values of variables."""
    from sympy import Expr, Rational

    if not x or not y or not isinstance(x[0], Expr) or not isinstance(y[0], Expr):
        return False
    names = sorted(x[0].free_symbols | y[0].free_symbols, key=str)
    # arbitrary points at which no usual function is zero, undefined or accidentally equal to another
    at = {name: Rational(17 + 6 * i, 13) for i, name in enumerate(names)}
    p, q = _evaluated(x[0], at), _evaluated(y[0], at)
    if p is None or q is None:
        return False
    scale = max(abs(p), abs(q))
    return bool(abs(p - q) > scale * Rational(1, 10 ** (DIGITS - 10)))


def _evaluated(expression: Any, at: dict[Any, Any]) -> Any | None:
    """Returns the value, exact if it is rational, else to DIGITS digits; None if it has none."""
    try:
        value = expression.subs(at).doit()
        if not getattr(value, "is_Rational", False):
            value = value.evalf(DIGITS)
        return value if value.is_number and value.is_finite else None
    except Exception:  # sympy raises many kinds of errors for what it cannot evaluate
        return None
