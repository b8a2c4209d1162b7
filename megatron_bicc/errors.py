"""Errors in a line."""


class NotFiniteError(ValueError):
    """A NaN or an infinite value among a run's numbers. One line: which, and what to look at."""


def first_line(error: BaseException) -> str:
    """What went wrong, without the pages that may follow: at most 300 characters."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]
