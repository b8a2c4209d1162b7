r"""Decides whether two final answers are equal: rules by the form of an answer, then computer algebra.

The rules are tried in the order of RULES; the first that returns a verdict decides. They come before computer
algebra because it reads words, units, tuples and bases as products of symbols and would equate wrong answers.
An answer may omit a unit or the name of a variable. The result is symmetric: it does not depend on which of
the two is the truth.
"""

import re
from collections.abc import Callable
from typing import Literal

from megatron_bicc.rewards import algebra
from megatron_bicc.rewards.normalize import normalize, unwrap_text
from megatron_bicc.rewards.quantities import Quantity, equal, read_compound, read_number, read_quantity

Reading = Literal["number", "mathematics", "text"]

_RELATION = re.compile(
    r"(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|\\approx(?![a-zA-Z])|\\in(?![a-zA-Z])|[<>]|(?<!_\{[a-zA-Z])=)"
)
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_NAME = r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\s*\([^()]*\))?'*|\\text\{[^{}]*\})"
"""A variable, a function at a point, or a word in its place"""
_CLOCK = re.compile(r"(\d{1,2})\s*:\s*([0-5]\d)")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_PRODUCTS = ("abc", "mn", "pq", "rst", "uv", "xyz")
"""Two letters of one of these are a product: xy, but not no, up, HT or AB"""
_SHORT_WORDS = {"no", "up", "on", "in", "us", "ok", "he", "me", "we", "it", "so", "pm", "am"}
"""Words of two letters, whose case is ignored"""
_CROSS = re.compile(r"(?<![\w\\}^])([a-zA-Z])\s*\\times\s*([a-zA-Z])(?![\w^({])")
"""A product of two letters, whose order matters if they are sets or vectors"""
_UNREAD = re.compile(
    r"""\.\.|\?|!!|--|\\(?:cross|equiv|cong|sim|propto)(?![a-zA-Z])|(?<![\w.])0[xX][\da-fA-F]|[\d)}\]]\s*'
    |(?<!\\sqrt)\[\s*(?:\\?[a-zA-Z]+|-?\d*\.\d+)\s*\]|\\\{\s*\\?[a-zA-Z]+\s*\\\}""",
    re.VERBOSE,
)
r"""Notations that computer algebra ignores or misreads: 1,2,...; 3!!; vectors a \times b; 5'; [x]"""


def same(answer: str, truth: str) -> bool:
    """Returns whether the two answers are equal."""
    a, b = normalize(answer), normalize(truth)
    return bool(a and b) and _balanced(a) and _balanced(b) and _same(a, b)


def quick(answer: str, truth: str) -> bool | None:
    """Compares equal texts and plain numbers, without computer algebra; None if that does not decide."""
    a, b = normalize(answer), normalize(truth)
    if not a or not b or not _balanced(a) or not _balanced(b):
        return False
    if a == b:
        return True
    return _numbers(a, b)


def is_number(text: str) -> bool:
    """Returns whether an answer is a plain number, with or without a unit."""
    normal = normalize(text)
    quantity = read_quantity(normal)
    return _balanced(normal) and read_number(quantity.value if quantity else normal) is not None


def reading(truth: str) -> Reading | None:
    """Returns the form in which a truth is compared; None if no answer can equal it."""
    text = normalize(truth)
    if (
        not text
        or text.casefold() == "nan"
        or not _balanced(text)
        or not any(c.isalnum() or c == "\\" for c in text)
    ):
        return None
    if is_number(truth):
        return "number"
    if _is_words(text):
        return "text"
    return "mathematics" if all(algebra.understood(part) for part in _parts(text)) else "text"


def _same(a: str, b: str) -> bool:
    if a == b:
        return bool(a)
    # a x b against b x a: equal as numbers, not as vectors or sets, and the text does not say which they are
    crossed = [set(_CROSS.findall(text)) for text in (a, b)]
    if any(p != q and (q, p) in crossed[1] for p, q in crossed[0]):
        return False
    if _UNREAD.search(a) or _UNREAD.search(b):  # compared as text
        return re.sub(r"[\s{}]", "", a) == re.sub(r"[\s{}]", "", b)
    for rule in RULES:
        verdict = rule(a, b)
        if verdict is not None:
            return verdict
    return algebra.equal(a, b)


def _numbers(a: str, b: str) -> bool | None:
    """Compares plain numbers exactly. Numbers with commas may also be lists: 100,200."""
    x, y = read_number(a), read_number(b)
    if x is None or y is None:
        return None
    if equal(x, y):
        return True
    return None if x.commas and y.commas else False


def _words(a: str, b: str) -> bool | None:
    """Compares words as text, not as products of letters. Against mathematics, letters may be a product."""
    words = [_is_words(text) for text in (a, b)]
    if all(words):
        x, y = _spelled(a), _spelled(b)
        # case matters for two letters that are not a word, such as the points AB and the lengths ab
        return x == y if len(x) > 2 or x in _SHORT_WORDS else unwrap_text(a) == unwrap_text(b)
    if not any(words):
        return None
    word, other = (a, b) if words[0] else (b, a)
    # abc is a product if the other answer is written as one: a \cdot b \cdot c, a b c
    if word.isalpha() and re.search(r"\\cdot|\^|(?<![a-zA-Z])[a-z] [a-z](?![a-zA-Z])", other):
        return algebra.equal(word, other)
    return _same_choice(word, other) or False


def _angles(a: str, b: str) -> bool | None:
    """Compares figures by the order of their points: angle ABC is not angle ACB."""
    figure = r"\\(?:angle|triangle|measuredangle|overline|widehat|parallel)"
    if re.match(figure, a) and re.match(figure, b) and not re.search(r"[=\d]", a + b):
        return re.sub(r"[\s{}]", "", a) == re.sub(r"[\s{}]", "", b)
    return None


def _same_choice(a: str, b: str) -> bool | None:
    """Compares multiple-choice options by letter, text, or both: (C) 12."""
    x, y = _choice(a), _choice(b)
    if x is None and y is None:
        return None
    if x and y:
        return x[0] == y[0] and (not x[1] or not y[1] or _same(x[1], y[1]))
    (letter, text), other = (x, b) if x else (y, a)  # type: ignore[misc]
    return _same(text, other) if text else letter == other


def _choice(text: str) -> tuple[str, str] | None:
    """Returns letter and text of an option, which may be a letter alone; None for any other answer."""
    match = re.fullmatch(r"\(?([A-Z])\)[.:]?\s*(.*)|([A-Z])[.:]\s+(.+)|([A-Z])", text)
    more = r"\([A-Z]\)|^[A-Z]\)?$|^(?:[,;/&]|(?:and|or|but|not)(?![a-zA-Z]))"
    if match and re.search(more, match[2] or match[4] or ""):
        return None  # two options are not one
    if not match or (match[2] or "").startswith(("^", "_", "+", "-", "=", "\\cup", "\\cap")):
        return None
    return match[1] or match[3] or match[5], match[2] or match[4] or ""


def _conditions(a: str, b: str) -> bool | None:
    """Compares inequalities as intervals: x > 3 is (3, infinity); x < 1 or x > 2 is a union."""
    x, y = _interval(a), _interval(b)
    if x is None and y is None:  # an inequality that is not solved for a variable, against a set: x^2 < 4
        condition, other = (a, b) if _RELATION.search(a) else (b, a)
        inequality = re.search(r"[<>]|\\[lg]e(?![a-zA-Z])", condition)
        return algebra.equal(a, b) if inequality and not _RELATION.search(other) and _is_set(other) else None
    if x and y:
        names = {name for name in (x[0], y[0]) if name}
        return len(names) < 2 and _same_union(x[1], y[1])
    (_, own), other = (x, b) if x else (y, a)  # type: ignore[misc]
    return _same_union(own, other) if _is_set(other) else (None if _RELATION.search(other) else False)


def _interval(text: str) -> tuple[str, str] | None:
    """Returns the variable, empty if there is none, and the interval or union of a condition on it."""
    # set-builder notation, \{x | x > 3\}, is the condition itself
    text = re.sub(rf"^\\\{{\s*{_NAME}\s*(?:\\in\s*\\mathbb\{{R\}}\s*)?[|:]\s*(.*)\\\}}$", r"\1", text)
    pieces, names = [], set()
    for condition in re.split(r"\s*(?<![a-zA-Z])or(?![a-zA-Z])\s*", text):
        sides = [side.strip() for side in _RELATION.split(condition)]
        found = _bounds(sides)
        if found is None:
            return None
        names.add(found[0])
        pieces.append(found[1])
    return (names.pop(), "\\cup ".join(pieces)) if len(names) == 1 else None


def _bounds(sides: list[str]) -> tuple[str, str] | None:
    """Returns variable and interval of x < 1 or 1 < x < 2, split at the relations; None for other forms."""
    if len(sides) == 3:
        left, relation, right = sides
        if re.fullmatch(_NAME, right) and not re.fullmatch(_NAME + "|", left):
            left, relation, right = right, _FLIPPED.get(relation, ""), left
        if not re.fullmatch(_NAME + "|", left) or not right or len(_split(right)) > 1:
            return None
        ends = {
            "<": f"(-\\infty,{right})",
            "\\le": f"(-\\infty,{right}]",
            ">": f"({right},\\infty)",
            "\\ge": f"[{right},\\infty)",
            "\\ne": f"(-\\infty,{right})\\cup ({right},\\infty)",
        }
        return (left, ends[relation]) if relation in ends else None
    if len(sides) == 5:
        low, first, name, second, high = sides
        if {first, second} <= {">", "\\ge"}:
            low, first, second, high = high, _FLIPPED[second], _FLIPPED[first], low
        if not {first, second} <= {"<", "\\le"} or not re.fullmatch(_NAME, name):
            return None
        begin, end = "(" if first == "<" else "[", ")" if second == "<" else "]"
        return name, f"{begin}{low},{high}{end}"
    return None


def _same_union(a: str, b: str) -> bool:
    """Compares unions of intervals in any order; computer algebra handles intervals that touch."""
    x, y = (re.split(r"\\cup(?![a-zA-Z])", text) for text in (a, b))
    if len(x) == len(y) and _unordered([part.strip() for part in x], [part.strip() for part in y]):
        return True
    return algebra.equal(a, b) if _is_set(b) and len(x) + len(y) > 2 else False


def _is_set(text: str) -> bool:
    return bool(re.match(r"[(\[]|\\\{|\\mathbb|\\emptyset", text))


def _membership(a: str, b: str) -> bool | None:
    """Compares x in a set as the set."""
    pattern = rf"{_NAME}\s*\\in(?![a-zA-Z])\s*(.+)"
    x, y = re.fullmatch(pattern, a), re.fullmatch(pattern, b)
    return _same(x[1] if x else a, y[1] if y else b) if x or y else None


def _lists(a: str, b: str) -> bool | None:
    """Compares element by element: tuples in order, sets and lists without brackets in any order."""
    x, y = _listed(a), _listed(b)
    if x is None and y is None:
        return None
    (open_a, items_a, close_a), (open_b, items_b, close_b) = x or ("", [a], ""), y or ("", [b], "")
    brackets = {open_a + close_a, open_b + close_b}
    if len(items_a) != len(items_b):
        return False
    # x < 1 or x > 2 is a union, x < 1 and x > 2 an intersection
    inequality = r"[<>]|\\[lg]e(?![a-zA-Z])"
    disjunctions = [bool(re.search(r"(?<![a-zA-Z])or(?![a-zA-Z])", text)) for text in (a, b)]
    if disjunctions[0] != disjunctions[1] and any(re.search(inequality, i) for i in items_a + items_b):
        return False
    if len(items_a) == 1 and (open_a or close_a or open_b or close_b):
        # \{x\} may also be the fractional part of x, which differs from x
        fractional = "{" in (open_a, open_b) and open_a != open_b and "." in items_a[0] + items_b[0]
        nested = open_a == open_b == "{" and items_a[0].startswith("\\{") != items_b[0].startswith("\\{")
        return not fractional and not nested and _same(items_a[0], items_b[0])
    if brackets in ({"{}"}, {""}, {"{}", ""}):
        return _unordered(items_a, items_b)
    # points and vectors are written in either brackets or none; an interval [1,2) is neither
    if len(brackets) == 2 and not brackets <= {"()", "", "<>", "column"} and brackets != {"row", ""}:
        return False
    return all(_same(p, q) for p, q in zip(items_a, items_b, strict=True))


def _listed(text: str) -> tuple[str, list[str], str] | None:
    """Returns bracket, elements and bracket of a list; (5) and [5,5] are lists of one element."""
    if matrix := re.fullmatch(r"\\begin\{[pbvBV]?(?:matrix|smallmatrix)\}(.*)\\end\{\w+\}", text.strip()):
        rows = [row.strip() for row in matrix[1].split("\\\\") if row.strip()]
        if len(rows) > 1 and not any("&" in row for row in rows):
            return "col", rows, "umn"
        if len(rows) == 1:
            return "ro", [cell.strip() for cell in rows[0].split("&")], "w"
        return None
    bracketed = re.fullmatch(r"(\\\{|\(|\[|\\langle|<)(.*)(\\\}|\)|\]|\\rangle|>)", text)
    if bracketed and _closes_at_end(text):
        signs = {"\\{": "{", "\\}": "}", "\\langle": "<", "\\rangle": ">"}
        begin, end = signs.get(bracketed[1], bracketed[1]), signs.get(bracketed[3], bracketed[3])
        items = _split(bracketed[2], words=begin == "{")
        if begin == "{":
            items = list(dict.fromkeys(items))  # an element counts once
        if begin + end == "[]" and len(items) == 2 and _same(items[0], items[1]):  # the interval [5,5]
            items = items[:1]
        if len(items) > 1 or begin + end in ("{}", "()"):
            return begin, items, end
        return None
    items = _split(text, words=True)
    return ("", items, "") if len(items) > 1 else None


def _split(text: str, words: bool = False) -> list[str]:
    """Returns the elements of a list, separated outside all brackets; 2 \\pm 1 is two elements."""
    parts, depth, start = [], 0, 0
    separators = r"[,;]|\\\\|\n" + (r"|(?<![a-zA-Z])(?:,?\s*and|,?\s*or)(?![a-zA-Z])" if words else "")
    for match in re.finditer(rf"\\begin\{{|\\end\{{|\\[{{}}]|[{{}}()\[\]]|{separators}", text):
        if match[0] in ("\\{", "{", "(", "[", "\\begin{"):
            depth += 1 + (match[0] == "\\begin{")
        elif match[0] in ("\\}", "}", ")", "]"):
            depth -= 1
        elif match[0] == "\\end{":  # the closing brace after it ends the level that \begin{ opened
            pass
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    items = [unwrap_text(part.strip()) for part in [*parts, text[start:]] if part.strip()]
    return [signed for item in items for signed in _both_signs(item)]


def _both_signs(text: str) -> list[str]:
    """Returns the two values of an answer with \\pm; the answer itself if it has none or is an inequality."""
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text) or _RELATION.search(text) and "=" not in text:
        return [text]
    upper = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", text))
    lower = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", text))
    return [re.sub(r"(^|[(=])\s*\+\s*", r"\1", sign).strip() for sign in (upper, lower)]


def _closes_at_end(text: str) -> bool:
    """Returns whether the bracket at the start of a text is closed at its end."""
    depth = 0
    for match in re.finditer(r"\\?[{}]|[()\[\]<>]|\\langle|\\rangle", text):
        depth += 1 if match[0][-1] in "{([<" or match[0] == "\\langle" else -1
        if depth == 0:
            return match.end() == len(text)
    return False


def _unordered(a: list[str], b: list[str]) -> bool:
    """Compares multisets. Takes an equal text first: a comparison by value may be slow."""
    left = list(b)
    for item in a:
        match = next((i for i, other in enumerate(left) if item == other), None)
        if match is None:
            match = next((i for i, other in enumerate(left) if _same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _equations(a: str, b: str) -> bool | None:
    """Compares equations: x = 5 equals 5, but not y = 5; a calculation equals its result."""
    x, y = (_RELATION.split(text) for text in (a, b))
    if len(x) == 1 and len(y) == 1:
        return None
    # for relations other than = and \approx: the same ones are left to later rules, others differ
    if set(x[1::2]) | set(y[1::2]) - {"\\approx"} != {"="} and set(x[1::2]) | set(y[1::2]) != {"\\approx"}:
        known = sorted(x[1::2]) == sorted(y[1::2]) or sorted(x[1::2]) == sorted(
            _FLIPPED.get(r, "") for r in y[1::2]
        )
        return None if known else False
    if not _consistent(x) or not _consistent(y):
        return False
    first, second = _assigned(x), _assigned(y)
    if len(x) > 1 and len(y) > 1:
        if first and second and first[0] and second[0]:
            # other names may be one equation rearranged, y = 2x and x = y/2: left to computer algebra
            return (
                first[0] == second[0]
                and _same(first[1], second[1])
                or (None if first[0] != second[0] and _has_letters(first[1] + second[1]) else False)
            )
        return None
    assigned = first if len(x) > 1 else second
    return _same(assigned[1], b if len(x) > 1 else a) if assigned else False


def _consistent(sides: list[str]) -> bool:
    """Returns whether all sides of an equation that are numbers are equal, unlike in 2 + 2 = 5."""
    if "\\approx" in sides[1::2]:
        return True
    variable = r"\\(?!(?:frac|sqrt|pi|times|cdot|div|binom|sin|cos|tan|log|ln)(?![a-zA-Z]))[a-zA-Z]"
    values = [
        s.strip() for s in sides[::2] if s.strip() and not _has_letters(s) and not re.search(variable, s)
    ]
    return all(_same(values[0], value) for value in values[1:])


def _assigned(sides: list[str]) -> tuple[str, str] | None:
    """Returns name and value of an equation; the name is empty if the left side is a calculation."""
    left, right = sides[0].strip(), sides[-1].strip()
    if re.fullmatch(_NAME, right) and not re.fullmatch(_NAME, left):
        left, right = right, left
    if re.fullmatch(_NAME, left):
        return re.sub(r"\s", "", left), right
    return ("", right) if not _has_letters(left) or _has_letters(right) else None


def _has_letters(text: str) -> bool:
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", text))


def _quantities(a: str, b: str) -> bool | None:
    """Compares quantities: a unit may be missing, but not differ; 5 feet 6 inches needs both parts."""
    compound_a, compound_b = read_compound(a), read_compound(b)
    if compound_a or compound_b:
        x, y = compound_a or [], compound_b or []
        return len(x) == len(y) and all(_same_quantity(p, q) for p, q in zip(x, y, strict=True))
    x, y = read_quantity(a), read_quantity(b)
    if x is None and y is None:
        return None
    return _same_quantity(x or Quantity(a, ""), y or Quantity(b, ""))


def _same_quantity(a: Quantity, b: Quantity) -> bool:
    if a.unit and b.unit:
        return a.unit == b.unit and _same(a.value, b.value)
    if _same(a.value, b.value):
        return True
    # without the sign it may be the fraction: 50 % equals 0.5
    percent, plain = (a, b) if a.unit == "%" else (b, a)
    number, other = read_number(percent.value), read_number(plain.value)
    return percent.unit == "%" and bool(number and other) and number.value == 100 * other.value  # type: ignore[union-attr]


def _bases(a: str, b: str) -> bool | None:
    """Compares digits in a base: 1011_2 is neither 1011_3 nor 11; the base may be missing."""
    x, y = _in_base(a), _in_base(b)
    if x is None and y is None:
        return None
    (digits, base), (others, other) = x or (a, ""), y or (b, "")
    return (not base or not other or base == other) and digits.lstrip("0").upper() == others.lstrip(
        "0"
    ).upper()


def _in_base(text: str) -> tuple[str, str] | None:
    match = re.fullmatch(
        r"(\d[\dA-Fa-f]*|[A-F][\dA-F]+)\s*(?:_\s*\{?\s*|\s*\(?\s*base\s*)(\d+|two|three|eight|ten)\s*\}?\)?",
        re.sub(r"\\text\{(\w)\}", r"\1", text),
    )
    names = {"two": "2", "three": "3", "eight": "8", "ten": "10"}
    return (match[1], names.get(match[2], match[2])) if match else None


def _ratios(a: str, b: str) -> bool | None:
    """Compares ratios, 2:4 with 1:2 and 1/2, and times of day by their digits."""
    # as ratios, 3:30 would equal 1:10
    clocks = [_CLOCK.fullmatch(text) for text in (a, b)]
    if all(clocks):
        return [int(p) for p in clocks[0].groups()] == [int(p) for p in clocks[1].groups()]  # type: ignore[union-attr]
    x, y = (re.split(r"\s*(?::|(?<![a-zA-Z])to(?![a-zA-Z]))\s*", text) for text in (a, b))
    if len(x) == 1 and len(y) == 1:
        return None
    if len(x) != len(y):
        parts, other = (x, b) if len(x) > 1 else (y, a)
        return (
            _same(f"\\frac{{{parts[0]}}}{{{parts[1]}}}", other) if len(parts) == 2 and all(parts) else False
        )
    # cross-multiplied, so that a term may be zero
    return all(
        _same(f"({x[0]})\\cdot ({q})", f"({y[0]})\\cdot ({p})") for p, q in zip(x[1:], y[1:], strict=True)
    )


def _texts(a: str, b: str) -> bool | None:
    """Requires answers with words in them, such as 5 if x > 0, to have the same words."""
    x, y = (sorted(_WORD.findall(re.sub(r"\\(?:begin|end)\{\w+\}", "", text))) for text in (a, b))
    return None if [w.casefold() for w in x] == [w.casefold() for w in y] else False


RULES: list[Callable[[str, str], bool | None]] = [
    _numbers,
    _angles,
    _words,
    _membership,
    _conditions,
    _same_choice,
    _bases,
    _quantities,
    _lists,
    _equations,
    _ratios,
    _texts,
]


def _is_words(text: str) -> bool:
    """Returns whether a text is words, not a product: 3 letters or more, no digit, no sign.

    Two letters alone are a word too, unless they are variables that go together (_PRODUCTS).
    """
    plain = unwrap_text(text)
    if len(plain) == 2 and plain.isalpha():
        return not _is_product(plain)
    if re.fullmatch(r"[A-Z](?: [A-Z])+", plain):
        return True
    return bool(_WORD.search(plain)) and not re.search(r"[\d\\^_=<>+*/|{}\[\],;:%$]", plain)


def _is_product(text: str) -> bool:
    return len(text) == 2 and any(set(text) <= set(letters) for letters in _PRODUCTS)


def _spelled(text: str) -> str:
    return re.sub(r"[\s.'\"-]+", " ", unwrap_text(text)).strip().casefold()


def _parts(text: str) -> list[str]:
    """Returns the parts that computer algebra must read: elements of lists, values of quantities."""
    if (listed := _listed(text)) and listed[1] != [text]:
        return [part for item in listed[1] for part in _parts(item)]
    if quantity := read_quantity(text):
        return [quantity.value]
    return [text]


def _balanced(text: str) -> bool:
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth < 0:
            return False
    return depth == 0 and not text.endswith("\\")
