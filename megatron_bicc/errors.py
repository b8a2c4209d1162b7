"""Errors that a user can cause, and how a command reports them. Standard library only."""

import os
import sys
import time
from typing import NoReturn, TextIO

PROGRAM = "python -m megatron_bicc.train"
"""The command that an error line names, unless another is given."""


class UserError(Exception):
    """Something the user got wrong or has to act on, in one line: name, value and remedy.

    Raised only by our own checks. A command prints its text without a traceback and exits with status 2; any
    other exception is a fault of the program and keeps its traceback and its cause.
    """


class NotFiniteError(UserError):
    """A NaN or an infinity among a run's numbers. One line: which number, and what to look at."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 300 characters; its type if it has no message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]


def abort(message: str, program: str = PROGRAM, everywhere: bool = False) -> NoReturn:
    """Ends the process with one line on stderr and exit status 2.

    everywhere: every process of the job prints its line, not only rank 0.
    """
    line = f"{program}: error: {' '.join(message.split())}\n"
    if everywhere:
        print(line, end="", file=sys.stderr, flush=True)
    else:
        print_rank0(line, sys.stderr)
    raise SystemExit(2)


def print_rank0(text: str, stream: TextIO) -> None:
    """Prints text on rank 0 of a torchrun; the other ranks wait 2 seconds instead.

    torchrun kills all processes as soon as one has failed, so the others must not fail before rank 0's output
    is flushed.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, end="", file=stream, flush=True)
    else:
        time.sleep(2)
