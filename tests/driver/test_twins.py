"""Tests torchrun killed by SIGKILL, and a second run in a directory that is in use."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import warm
from support.forked import torchrun_variables

from megatron_bicc.launcher import Process, process

pytestmark = pytest.mark.timeout(900)  # a busy machine needs minutes to start a run
REPOSITORY = Path(__file__).parents[2]
SETTINGS = [
    *("-m", "megatron_bicc.train", "--config", "examples/configs/tiny.yaml", "rollout.prompts_per_step=4"),
    *("evaluation.data=", "checkpoint.every=1", "monitoring.tensorboard=false", "train.steps=1000"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command: list[str], err: Path, **variables: str) -> subprocess.Popen:
    """A program that writes to `err`."""
    with err.open("w") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=file, stderr=file)


def children(pid: int) -> list[Process]:
    """The running processes that a process started."""
    found = (process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [one for one in found if one and one.parent == pid]


def until(true: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(true())


def test_a_second_run_is_refused_and_the_first_ends_with_its_launcher(tmp_path: Path) -> None:
    """The second says whom it found; after the kill the directory is free at once."""
    out = tmp_path / "run"
    python = [sys.executable, "-W", "ignore"]
    first = start([*python, *TORCHRUN, *SETTINGS, f"output_dir={out}"], tmp_path / "first")
    try:
        assert until((out / "checkpoints/step_00000001").exists, 200), (tmp_path / "first").read_text()
        workers = children(first.pid)
        assert len(workers) == 2
        second = [*SETTINGS, f"output_dir={out}", "parallel.tensor=1", "checkpoint.resume=true"]
        ended = warm.run(second, timeout_s=200)
        assert ended.returncode == 2
        named = re.search(rf"{out} is in use by process (\d+) on host {socket.gethostname()}, ", ended.stderr)
        assert named, ended.stderr
        assert int(named[1]) in [worker.pid for worker in workers]
        assert all(worker.is_running() for worker in workers)
    finally:
        first.send_signal(signal.SIGKILL)
    assert until(lambda: not any(worker.is_running() for worker in workers), 5)
    first.wait()


def test_a_worker_at_the_rendezvous_ends_with_its_launcher(tmp_path: Path) -> None:
    """The other one never comes."""
    variables = torchrun_variables(2)[0]
    command = [sys.executable, "-W", "ignore", *SETTINGS, f"output_dir={tmp_path / 'run'}"]
    shell = start(["bash", "-c", '"$@"; :', "shell", *command], tmp_path / "err", **variables)
    address = ("127.0.0.1", int(variables["MASTER_PORT"]))

    def waits() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(address) == 0

    try:
        assert until(waits, 200), (tmp_path / "err").read_text()
        (worker,) = children(shell.pid)
    finally:
        shell.kill()
    assert until(lambda: not worker.is_running(), 5)
    shell.wait()
