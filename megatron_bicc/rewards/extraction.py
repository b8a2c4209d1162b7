"""Find the final answer in a response."""


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...}, stripped; None if there is none or its braces do not close."""
    _, command, tail = text.rpartition("\\boxed")
    body = tail.lstrip()
    if not command or not body.startswith("{"):
        return None
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
