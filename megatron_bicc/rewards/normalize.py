r"""Normalizes the spelling of answers: Unicode, Markdown and plain text become simple LaTeX.

Only the spelling changes, never the value: rewards.verdict compares the meaning.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

_LETTERS = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψω",
        [
            *(
                "alpha",
                "beta",
                "gamma",
                "delta",
                "epsilon",
                "zeta",
                "eta",
                "theta",
                "iota",
                "kappa",
                "lambda",
            ),
            *("mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
        ],
        strict=True,
    )
)
_SPELLINGS = {
    "-": "−–—‐‑－",
    "\\times ": "×",
    "\\cdot ": "⋅·∙",
    "/": "÷∕⁄",
    "\\pm ": "±",
    "\\mp ": "∓",
    "\\le ": "≤⩽",
    "\\ge ": "≥⩾",
    "\\ne ": "≠",
    "\\approx ": "≈",
    "\\infty ": "∞",
    "\\cup ": "∪",
    "\\cap ": "∩",
    "\\in ": "∈",
    "\\emptyset ": "∅",
    "\\setminus ": "∖",
    "\\lor ": "∨",
    "\\mathbb{R}": "ℝ",
    "\\mathbb{Z}": "ℤ",
    "\\mathbb{N}": "ℕ",
    "\\mathbb{Q}": "ℚ",
    "\\mathbb{C}": "ℂ",
    "^\\circ ": "°º˚",
    "\\angle ": "∠",
    "\\triangle ": "△",
    "\\langle ": "⟨",
    "\\rangle ": "⟩",
    "\\lfloor ": "⌊",
    "\\rfloor ": "⌋",
    "\\lceil ": "⌈",
    "\\rceil ": "⌉",
    "...": "…⋯",
    ",": "，、",
    ":": "：∶",
    ".": "。",
    "|": "∣",
    '"': "“”",
    "'": "‘’′",
    "": "\u200b\ufeff",
}
_SYMBOLS = {symbol: latex for latex, symbols in _SPELLINGS.items() for symbol in symbols} | {
    letter: f"\\{name} " for letter, name in _LETTERS.items()
}
"""LaTeX by Unicode character; NFKC handles wide forms of ASCII"""
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))

ATOM = r"(?:\{[^{}]*\}|\\[a-zA-Z]+|[0-9a-zA-Z])"
r"""An argument of a command such as \frac without nested braces: a group, a command or one character"""

_LETTER = rf"(?:\\(?:{'|'.join(_LETTERS.values())})(?![a-zA-Z])|[a-zA-Z])"

_SYNONYMS = {
    "dne": "does not exist",
    "undef": "undefined",
    "all reals": "(-\\infty,\\infty)",
    "all real numbers": "(-\\infty,\\infty)",
    "all real x": "(-\\infty,\\infty)",
    "the real numbers": "(-\\infty,\\infty)",
    "real numbers": "(-\\infty,\\infty)",
    "the set of all real numbers": "(-\\infty,\\infty)",
    "\\mathbb{r}": "(-\\infty,\\infty)",
    "empty set": "\\emptyset",
    "the empty set": "\\emptyset",
    "\\{\\}": "\\emptyset",
    "infinity": "\\infty",
    "negative infinity": "-\\infty",
    "no solution": "\\emptyset",
    "no solutions": "\\emptyset",
}
"""Replacements of whole answers"""
_SYNONYMS |= {
    word: str(value)
    for value, word in enumerate(
        [
            *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
            *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
            *("nineteen", "twenty"),
        ]
    )
}

_PHRASES = [
    (r"(?:no (?:less|fewer)|not (?:less|fewer)) than", r"\\ge "),
    (r"(?:no|not) (?:more|greater) than", r"\\le "),
    (r"at least", r"\\ge "),
    (r"at most", r"\\le "),
    (r"(?:is )?(?:more|greater) than or equal to", r"\\ge "),
    (r"(?:is )?(?:less|fewer) than or equal to", r"\\le "),
    (r"(?:is )?(?:more|greater|larger) than", r">"),
    (r"(?:is )?(?:less|fewer|smaller) than", r"<"),
    (r"(?:is )?not equal to|not", r"\\ne "),
]
"""Relations in words before a number; longer phrases first"""

_TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


@lru_cache(maxsize=65536)
def normalize(text: str) -> str:
    """Returns the normalized answer; empty if nothing remains."""
    for _ in range(4):  # wrappers nest: **$\boxed{5}$.**
        before = text
        text = _unwrapped(_characters(text))
        if text == before:
            break
    for rule in _RULES:
        text = rule(text)
    text = re.sub(r"\s+", " ", text).strip()
    return _SYNONYMS.get(text.casefold(), text)


def unwrap_text(text: str) -> str:
    r"""Returns the words of an answer that is one \text{...}, else the answer itself."""
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return whole[1].strip() if whole else text


def _characters(text: str) -> str:
    text = re.sub(
        f"[{''.join(_SUPERSCRIPTS)}]+", lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m[0])}}}", text
    )
    text = re.sub(
        f"[{''.join(_SUBSCRIPTS)}]+", lambda m: f"_{{{''.join(_SUBSCRIPTS[c] for c in m[0])}}}", text
    )
    text = re.sub(r"√\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-zA-Zπ])", r"\\sqrt{\1}", text)
    text = re.sub(r"∛\s*\(?(\d+|[a-zA-Z])\)?", r"\\sqrt[3]{\1}", text)
    text = re.sub(r"(?<=\d)\s*[–—]\s*(?=\d)", "--", text)  # a range, not a difference
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    return "".join(c if c.isascii() else _compatible(c) for c in text)


def _compatible(character: str) -> str:
    """Replaces vulgar fractions, wide and styled letters and Unicode spaces by their plain forms."""
    if character.isspace():
        return " "
    plain = unicodedata.normalize("NFKC", character)
    if fraction := re.fullmatch(r"(\d+)\N{FRACTION SLASH}(\d+)", plain):
        return f"\\frac{{{fraction[1]}}}{{{fraction[2]}}}"
    return plain


_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(.*)\$\$",
        r"\$([^$]*[^$\\])\$",
        r"\\\((.*)\\\)",
        r"\\\[(.*)\\\]",
        r"\\(?:boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*)\}",
        r"\\(?:displaystyle|textstyle)\b(.*)",
        r"\\ensuremath\s*\{([^{}]*)\}",
        r"\{([^{}]*)\}",
        r"\\begin\{array\}\{c\}([^&]*)\\end\{array\}",
        r"\\begin\{(?:aligned|align\*?|split|gathered|equation\*?)\}(.*)\\end\{(?:aligned|align\*?|split|gathered|equation\*?)\}",
        r"\*{1,3}([^*]+)\*{1,3}",
        r"_{2}([^_]+)_{2}",
        r"`+([^`]*)`+",
        r'"([^"]*)"',
        r"'([^']*)'",
        r'\["([^"]*)"\]',
        r"(?:the )?(?:final )?answer(?: is)?\s*:?\s+(.+)",
    )
]


def _unwrapped(text: str) -> str:
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", text)
    text = re.sub(r"(?:(?<!\\)\\(?:[,;:!> ]|q?quad|$)|~|\s)+$", "", text).strip()
    text = re.sub(r"^\*+\s*|\s*\*+$", "", text)
    text = re.sub(r"(?:\.|,|;|:)+$", "", text) if not text.endswith("..") else text
    for wrapper in _WRAPPERS:
        if whole := wrapper.fullmatch(text):
            return whole[1].strip()
    return text.strip()


def _latex(text: str) -> str:
    """Removes layout commands and replaces synonymous commands by one."""
    text = re.sub(r"^\\\\|\\\\$", "", text.strip())  # a line break at an end
    text = re.sub(r"&\s*(?=[=<>]|\\[lgn]e)", "", text)  # where lines are aligned
    text = re.sub(r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*(\.(?!\d))?", "", text)
    text = re.sub(r"\\(?:displaystyle|textstyle|limits|nolimits|phantom\{[^{}]*\})(?![a-zA-Z])", "", text)
    text = re.sub(r"\\(?:hspace|vspace)\*?\{[^{}]*\}", " ", text)
    text = re.sub(r"(?<=\d)(?:\\[,;:! ]|~|\{,\}|,\\!|\\!,)(?=\d{3}(?!\d))", "", text)  # 10\,000
    text = re.sub(r"(?<!\\)\\(?:[,;:!> ]|q?quad(?![a-zA-Z])|thinspace(?![a-zA-Z]))", " ", text)
    text = text.replace("~", " ").replace("{,}", ",")
    text = re.sub(
        r"\\(?:textbf|textit|textrm|textsf|textsc|mbox|hbox|mathrm|operatorname\*?|emph)\s*\{",
        r"\\text{",
        text,
    )
    vector = r"\\(?:mathbf|boldsymbol|bm|vec|overrightarrow|hat)\s*(?:\{[^{}]*\}|\\?[a-zA-Z]+)"
    text = re.sub(rf"({vector})\s*\\times\s*(?={vector})", r"\1\\cross ", text)
    text = re.sub(r"\\(?:mathbf|boldsymbol|mathit|mathsf|bm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:mathbf|boldsymbol|bm)\s+(?=[a-zA-Z])", "", text)
    text = re.sub(r"\\hat\s*(?:\{\s*([ijk])\s*\}|\s([ijk])(?![a-zA-Z]))", r"\1\2", text)  # unit vectors
    text = re.sub(r"\\(?:lt|gt)(?![a-zA-Z])", lambda m: {"\\lt": "<", "\\gt": ">"}[m[0]], text)
    text = re.sub(r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=", r"\\le ", text)
    text = re.sub(r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge ", text)
    text = re.sub(r"\\(?:neq|not\s*=)(?![a-zA-Z])|!=|\\not\s*=", r"\\ne ", text)
    text = re.sub(r"\\varnothing(?![a-zA-Z])", r"\\emptyset", text)
    text = re.sub(r"\\(?:mathbb|bf|bb)\s*\{?([RZNQC])\}?", r"\\mathbb{\1}", text)
    text = re.sub(
        r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|\{\\circ\}", " degrees ", text
    )
    text = re.sub(r"\\(?:ldots|dots|cdots|dotsc)(?![a-zA-Z])", "...", text)
    text = re.sub(r"(?<=_)\{\s*([a-zA-Z])\s*=\s*", r"{\1=", text)  # the index of a sum
    text = re.sub(r"\\backslash|\\smallsetminus", r"\\setminus", text)
    text = text.replace("\\%", "%").replace("\\#", "#").replace("\\&", "&").replace("\\_", "_")
    text = re.sub(r"\\(?:mid|vert|lvert|rvert)(?![a-zA-Z])", "|", text)
    text = re.sub(r"\\(?:land|wedge)(?![a-zA-Z])", " and ", text)
    return re.sub(r"\\(?:lor|vee)(?![a-zA-Z])", " or ", text)


def _words(text: str) -> str:
    r"""Replaces \text{...} by its words, except for a single letter: \text{m} is a unit, m a variable."""
    text = unwrap_text(text.strip())
    text = re.sub(r"\\text\s*\{([^{}]*)\}", _plain_words, text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(
        r"^(?:about|approximately|approx\.?|around|roughly|exactly|only|\\approx|\\sim|=)\s*(?=[-\d\\.$(])",
        "",
        text,
        flags=re.I,
    )
    text = re.sub(r"^(?:minus|negative)\s+(?=[\d.\\$])", "-", text, flags=re.I)
    text = re.sub(r"^(\d+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?$", r"\1", text)  # 1st, 5^{th}
    text = re.sub(r"(?<= degrees )\s*(?:\\text\{\s*)?\\?([CF])\s*\}?$", lambda m: _TEMPERATURES[m[1]], text)
    text = re.sub(
        r"^(\d+) and (?:a|one)[ -]half(?![a-zA-Z])", lambda m: f"\\frac{{{2 * int(m[1]) + 1}}}{{2}}", text
    )
    for words, relation in _PHRASES:
        text = re.sub(rf"(?<![a-zA-Z])(?:{words})\s*(?=[-+\d\\.$])", relation, text, flags=re.I)
    return text


def _plain_words(match: re.Match[str]) -> str:
    words = match[1].strip()
    return f"\\text{{{words}}}" if len(words) == 1 and words.isalpha() else f" {words} "


def _plain_mathematics(text: str) -> str:
    """Converts plain-text mathematics to LaTeX: sqrt(2), x**2, 3*4, 3e4, pi."""
    text = re.sub(r"(?<!\\)\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![a-zA-Z\\])sqrt\s*\{", r"\\sqrt{", text)
    text = re.sub(r"(?<![a-zA-Z\\])sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\[\d+\])?\s*(\d)", lambda m: f"\\sqrt{m[1] or ''}{{{m[2]}}}", text)
    text = re.sub(r"\\sqrt(\[\d*[13579]\])\{\s*-\s*(\d+)\s*\}", r"(-\\sqrt\1{\2})", text)  # the real root
    text = re.sub(r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times ", text)  # 5x10^3
    text = text.replace("**", "^").replace("*", "\\cdot ")
    text = re.sub(r"(?<![a-zA-Z\\])(sin|cos|tan|log|ln|pi|infinity)(?![a-zA-Z])(?=.)", _command, text)
    text = re.sub(r"(?<![a-zA-Z\\])pi$", r"\\pi", text)
    text = re.sub(r"(\\(?:sin|cos|tan|sec|csc|cot)\s*\(?\s*\{?)(\d+(?:\.\d+)?) degrees\s*", _radians, text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.])", _scientific, text)
    text = re.sub(r"\+\s*-", "-", text)  # 14 + -1i
    return re.sub(r"-\s*\+", "-", text)


def _command(match: re.Match[str]) -> str:
    return "\\infty " if match[1] == "infinity" else f"\\{match[1]} "


def _radians(match: re.Match[str]) -> str:
    return f"{match[1]}{{\\frac{{{match[2]}\\pi}}{{180}}}} "


def _scientific(match: re.Match[str]) -> str:
    return f"{match[1]} \\times 10^{{{int(match[2])}}}"


def _repeating(text: str) -> str:
    """Replaces a repeating decimal by its fraction: 0.1\\overline{6}, 0.(3), 0.3..., 0.\\dot{3}."""
    number = r"(?<![\d.])(-?)(\d*)\.(\d*)"
    text = re.sub(
        number + r"\\(?:overline|bar|overbar)\s*(?:\{(\d+)\}|(\d))(?!\d)", _fraction_of_repeating, text
    )
    text = re.sub(number + r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?(?!\d)", _fraction_of_dotted, text)
    text = re.sub(number + r"\((\d+)\)()(?!\d)", _fraction_of_repeating, text)
    text = re.sub(number + r"\s*\.{2,}$", _fraction_of_dots, text)
    return text


def _fraction_of_repeating(match: re.Match[str]) -> str:
    sign, whole, fixed, several, one = match.groups()
    return _repeating_fraction(sign, whole, fixed, several or one)


def _fraction_of_dotted(match: re.Match[str]) -> str:
    sign, whole, fixed, first, middle, last = match.groups()
    return _repeating_fraction(sign, whole, fixed, first + (middle or "") + (last or ""))


def _fraction_of_dots(match: re.Match[str]) -> str:
    """Reads 0.1666... as repeating if it ends in three equal digits, or twice in a longer period."""
    sign, whole, digits = match.groups()
    for period in range(1, len(digits) // 2 + 1):
        times = 3 if period == 1 else 2
        repeated = digits[-period:]
        if len(digits) >= times * period and digits.endswith(repeated * times):
            return _repeating_fraction(sign, whole, digits, repeated)
    return match[0]


def _repeating_fraction(sign: str, whole: str, fixed: str, repeated: str) -> str:
    numerator = int(f"{whole}{fixed}{repeated}") - int(f"{whole}{fixed}" or "0")
    return f"{sign}\\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def _mixed(text: str) -> str:
    """Replaces mixed numbers by one fraction: 1 1/4, 1\\frac14, 1 and 1/4."""
    text = re.sub(r"\\(frac|binom)\s*(\d)\s*(\d)(?!\d)", r"\\\1{\2}{\3}", text)
    text = re.sub(rf"\\frac\s*(\d)\s*(?={ATOM})", r"\\frac{\1}", text)
    text = re.sub(rf"\\(frac|binom)(?![a-zA-Z])\s*({_LETTER})\s*(?={ATOM})", r"\\\1{\2}", text)
    group = r"\{(?:[^{}]|\{[^{}]*\})*\}"
    text = re.sub(rf"\\(frac|binom)\s*({group})\s*({_LETTER}|\d(?!\d))", r"\\\1\2{\3}", text)
    text = re.sub(
        r"(?<![\w.^_}/,])(\d+)\s*(?:\s+and\s+|\s*)\\frac\s*\{(\d+)\}\s*\{(\d+)\}(?![\w^])",
        _one_fraction,
        text,
    )
    return re.sub(r"(?<![\w.^_}/,])(\d+)\s+(?:and\s+)?(\d+)\s*/\s*(\d+)(?![\w^/.])", _one_fraction, text)


def _one_fraction(match: re.Match[str]) -> str:
    whole, over, under = (int(part) for part in match.groups())
    return f"\\frac{{{whole * under + over}}}{{{under}}}"


def _thousands(text: str) -> str:
    """Removes spaces and apostrophes between groups of three digits; a comma may separate numbers."""
    return re.sub(r"(?<![\d.])\d{1,3}(?:[ ']\d{3})+(?![\d])", lambda m: re.sub("[ ']", "", m[0]), text)


def _scales(text: str) -> str:
    """Replaces 3.2 million by 3.2 times a power of ten."""
    return re.sub(
        rf"(?<=\d)\s*({'|'.join(_SCALES)})(?![a-zA-Z])",
        lambda m: f" \\times 10^{{{_SCALES[m[1].lower()]}}}",
        text,
        flags=re.I,
    )


def _ends(text: str) -> str:
    """Removes punctuation at the end: `180,`, `34 apples.`"""
    text = text.strip()
    return text if text.endswith("..") else re.sub(r"\s*[.,;:]+$", "", text) or text


_RULES: list[Callable[[str], str]] = [
    _latex, _words, _thousands, _repeating, _ends, _mixed, _plain_mathematics, _scales,
]  # fmt: skip
