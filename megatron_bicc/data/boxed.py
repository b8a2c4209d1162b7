r"""Reads \boxed{...}, which marks the final answer of a solution in a data file and of a response."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_ARGUMENT = re.compile(
    r"\s*([-+]?\s*\$?\d[\d,]*(?:\.\d+)?%?|-?\\[a-zA-Z]+(?:\s*\{[^{}]*\})*|[a-zA-Z](?![a-zA-Z]))"
)


def has_box(text: str) -> bool:
    r"""Returns whether \boxed or \fbox occurs in a text, closed or not."""
    return _BOX.search(text) is not None


def last_boxed(text: str) -> str | None:
    r"""Returns what stands in the last \boxed{...} or \fbox{...}, stripped; None if none is there or closes.

    Without braces (\boxed 2, as in the published MATH) it is the number, command or letter that follows.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    body = text[boxes[-1].end() :].lstrip()
    if not body.startswith("{"):
        argument = _ARGUMENT.match(body)
        return argument[1].rstrip(",").strip() if argument else None
    depth = position = 0
    while position < len(body):
        character = body[position]
        if character == "\\":
            position += 2  # \{ and \} are characters of the answer, not braces
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return body[1:position].strip()
        position += 1
    return None
