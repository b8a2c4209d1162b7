"""Which exceptions end a run, and how each is printed.

UserError: the user has to change settings, files or surroundings. One line, exit status 2. Those of a run in
progress are CheckpointError, NotFiniteError, EngineMismatch and NoContrastError.

RolloutError, WeightSyncError and a lost peer (device.is_connection_loss): servers, hosts or links failed.
One line that says how to resume, then the traceback, on every rank; exit status 1.

Any other: a fault of the program. The traceback with its cause, on the rank that raised it; exit status 1.

`train.main` and `evaluate.main` hold the only `except UserError`. After an error of the first two kinds a run
can be resumed from its newest checkpoint.
"""


class UserError(Exception):
    """What the user got wrong or has to act on: one line with the name, the value and what to do.

    Only checks of this package raise it. The command prints its text without a traceback and exits with
    status 2; any other exception is a fault of the program and keeps its traceback and its cause.
    """


class NotFiniteError(UserError):
    """A NaN or an infinite value among a run's numbers. One line: which, and what to look at."""


def first_line(error: BaseException) -> str:
    """Returns the first line of the message, at most 300 characters; the error's type if it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300]
