"""Tests that a worker ends soon after its launcher, unless it has none or must outlive its shell."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bicc.launcher import process

REPOSITORY = Path(__file__).parents[2]
WORKER = """
import os, sys, time
from megatron_bicc import launcher
launcher.end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
IMPORTING = WORKER.replace("time.sleep(60)", "import torch; torch.ones(1); time.sleep(60)")
TORCHRUN, RANK = {"TORCHELASTIC_RUN_ID": "job", "RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "0"}
# what stands between a launcher and its worker; as the last words of a shell it would be the worker itself
DIRECT, WRAPPED = '"$@"; :', 'bash -c \'"$@"; :\' wrapper "$@"; :'
OWN_SESSION = 'setsid -w bash -c \'"$@"; :\' wrapper "$@"; :'


class Launched:
    """A launcher, which is a shell, and its worker."""

    def __init__(
        self, tmp_path: Path, variables: dict[str, str], script: str, name: str, worker: str
    ) -> None:
        shell = tmp_path / name
        shell.symlink_to("/bin/bash")
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")}
        command = [str(shell), "-c", script, "launcher", sys.executable, "-W", "ignore", "-c", worker]
        self.err = tmp_path / "err"
        self.launcher = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=env | variables | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=self.err.open("w"),
            text=True,
            start_new_session=True,
        )
        self.worker = process(int(self.launcher.stdout.readline()))

    def ends(self, seconds: float) -> bool:
        """Whether the worker ends within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.worker.is_running():
            time.sleep(0.05)
        return not self.worker.is_running()


@pytest.fixture
def launched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Launched]:
    found = Launched(tmp_path, *request.param)
    yield found
    for pid in (found.launcher.pid, found.worker.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    found.launcher.wait()


@pytest.mark.parametrize(
    "launched",
    [
        pytest.param((TORCHRUN, "setsid -w " + DIRECT, "torchrun", WORKER), id="torchrun"),
        pytest.param((TORCHRUN, OWN_SESSION, "torchrun", WORKER), id="torchrun-wrapper"),
        pytest.param((RANK, DIRECT, "shell", WORKER), id="shell"),
        pytest.param((RANK, WRAPPED, "shell", WORKER), id="shell-wrapper"),
        pytest.param((SLURM, OWN_SESSION, "slurmstepd", WORKER), id="srun-wrapper"),
        pytest.param((RANK, DIRECT, "shell", IMPORTING), id="while-it-imports"),
    ],
    indirect=True,
)
def test_a_worker_ends_with_its_launcher(launched: Launched) -> None:
    launched.launcher.kill()  # not waited for: a zombie is no launcher
    assert launched.ends(seconds=5)
    assert "on host" in launched.err.read_text()
    assert "its launcher, process" in launched.err.read_text()


@pytest.mark.parametrize(
    "launched",
    [
        pytest.param(({}, DIRECT, "shell", WORKER), id="alone"),
        pytest.param((RANK, "trap '' HUP; " + DIRECT, "shell", WORKER), id="nohup"),
    ],
    indirect=True,
)
def test_a_process_outlives_a_shell_that_is_no_launcher(launched: Launched) -> None:
    launched.launcher.kill()
    launched.launcher.wait()
    assert not launched.ends(seconds=2)
