"""Training runs that a test starts, watches and kills, forked from the warm process."""

import contextlib
import os
import signal
from pathlib import Path

from support.warm import warm_process


class ForkedRuns:
    """Starts runs, one at a time."""

    TIMEOUT_S = 300.0

    def __init__(self) -> None:
        self._err = Path()
        self._pid: int | None = None

    def start(self, settings: list[str], err: Path) -> int:
        """Starts a run with this command line; returns its process id. Its stderr goes to `err`."""
        command = ["-m", "megatron_bicc.train", *settings]
        self._err = err
        (self._pid,) = warm_process().start(command, [{}], Path(os.devnull), err, self.TIMEOUT_S)
        return self._pid

    def wait(self) -> dict:
        """Returns the run's end: {"status": exit status, "err": what it said on stderr}."""
        status = warm_process().wait(self.TIMEOUT_S)
        self._pid = None
        assert status is not None, f"the run has not ended: {self._err.read_text()}"
        return {"status": status, "err": self._err.read_text()}

    def close(self) -> None:
        """Kills a run that has not ended."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self.wait()
