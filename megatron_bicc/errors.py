"""The exceptions that a user can cause, and how an error is put in one line."""


class UserError(Exception):
    """What the user got wrong or has to act on: one line with the name, the value and what to do.

    Our own checks raise it, and only for that. The command prints its text without a traceback and exits with
    status 2; any other exception is a fault of the program and keeps its traceback and its cause.
    """


class NotFiniteError(UserError):
    """A NaN or an infinite value among a run's numbers. One line: which, and what to look at."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; the error's type where it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]
