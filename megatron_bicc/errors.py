"""Which exceptions end a run, and how each is printed. Standard library only.

UserError: the user must change settings, files or the environment. One line, exit status 2. During a run
these are CheckpointError, NotFiniteError, EngineMismatch and NoContrastError.

RolloutError, WeightSyncError and a lost peer (device.is_connection_loss): servers, hosts or links failed.
One line that says how to resume, then the traceback, on every rank; exit status 1.

Any other: a fault of the program. The traceback with its cause, on the rank that raised it; exit status 1.

`train.main` and `evaluate.main` hold the only `except UserError`. After an error of the first two kinds a run
can be resumed from its newest checkpoint.
"""

import sys
import time
from typing import NoReturn, TextIO

from megatron_bicc import launcher

PROGRAM = "python -m megatron_bicc.train"
"""The command that an error line names, unless another is given."""
TURN_S = 2.0
"""Seconds within which torchrun kills the other ranks"""


class UserError(Exception):
    """A mistake or a condition that the user must act on, in one line: name, value and remedy.

    Only checks of this package raise it. The command prints its text without a traceback and exits with
    status 2; any other exception is a fault of the program and keeps its traceback and its cause.
    """


class NotFiniteError(UserError):
    """A NaN or an infinity among a run's numbers. One line: which number, and what to look at."""


def shortened(text: str) -> str:
    """Returns at most 100 characters of a text for an error line, quoted if it is empty or not printable."""
    shown = text if text and text.isprintable() else repr(text)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def first_line(error: BaseException) -> str:
    """Returns the first line of the message, at most 300 characters; the error's type if it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]


def abort(message: str, program: str = PROGRAM) -> NoReturn:
    """Ends the process with one line on stderr and exit status 2.

    Rank 0 prints at once, the others after a pause that grows with the local rank. torchrun kills the rest as
    soon as one rank has exited, so an error that all ranks have is printed once.
    """
    where = ""
    if launcher.rank() > 0:
        time.sleep(TURN_S + 0.25 * launcher.local_rank())
        where = f"{launcher.place()}: "
    print(f"{program}: error: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def print_rank0(text: str, stream: TextIO) -> None:
    """Prints on rank 0; the other ranks wait, because torchrun kills all processes once one has exited."""
    if launcher.rank() == 0:
        print(text, end="", file=stream, flush=True)
    else:
        time.sleep(TURN_S)
