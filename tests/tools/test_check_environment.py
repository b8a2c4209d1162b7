"""Tests every failing check of the environment: one line with what is wrong and what to do.

`nvidia-smi` is a test double, a shell script on PATH; ports, directories and clocks are real.
"""

import importlib.util
import os
import socket
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_bicc import device

TOOL = Path(__file__).parents[2] / "tools/check_environment.py"
FOUR_GPUS = "echo 580.95.05; echo 580.95.05; echo 580.95.05; echo 580.95.05"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/check_environment.py"""
    spec = importlib.util.spec_from_file_location("check_environment", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch that reaches four GPUs, as far as the checks ask."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))


@pytest.fixture
def run(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the checks on a host whose nvidia-smi does what a shell text says; returns the failures."""
    (tmp_path / "bin").mkdir()

    def run(nvidia_smi: str | None, *arguments: str) -> list[str]:
        if nvidia_smi is not None:
            double = tmp_path / "bin/nvidia-smi"
            double.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
            double.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        status = tool.main(
            ["--gpus", "4", "--master-port", str(free_port()), "--shared", str(tmp_path)]
            + ["--sglang-python", str(tmp_path / "python"), *arguments]
        )
        lines = capsys.readouterr().err.splitlines()
        assert status == (1 if lines else 0)
        return lines

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_good_host_passes(run, gpus: None) -> None:
    assert run(FOUR_GPUS) == []


@pytest.mark.parametrize(
    ("nvidia_smi", "part"),
    [
        (None, "no NVIDIA GPU: nvidia-smi is not installed"),
        (
            "echo 'Driver/library version mismatch'; exit 9",
            "nvidia-smi fails: Driver/library version mismatch",
        ),
        ("echo 580.95.05", "1 GPUs, 4 needed"),
        ("echo garbage", "nvidia-smi answers 'garbage' instead of the driver's version: install or restart"),
        ("exit 0", "nvidia-smi answers '' instead of the driver's version"),
        ("for i in 1 2 3 4; do echo 570.86.10; done", "NVIDIA driver 570.86.10 is too old for CUDA 13"),
    ],
)
def test_driver(run, gpus: None, nvidia_smi: str | None, part: str) -> None:
    (line,) = run(nvidia_smi)
    assert part in line


@pytest.mark.parametrize(
    ("place", "name", "value", "part"),
    [
        (torch.version, "cuda", None, "torch is a CPU build"),
        (torch.cuda, "device_count", lambda: 3, "torch sees 3 GPUs, 4 needed"),
        (torch.distributed, "is_nccl_available", lambda: False, "torch has no NCCL"),
        (torch.cuda.nccl, "version", lambda: (2, 14, 3), "NCCL 2.14.3 is too old"),
    ],
)
def test_nccl(
    run, gpus: None, monkeypatch: pytest.MonkeyPatch, place: object, name: str, value: object, part: str
) -> None:
    monkeypatch.setattr(place, name, value)
    (line,) = run(FOUR_GPUS)
    assert part in line


@pytest.mark.parametrize(
    ("python", "part"),
    [
        ("echo 2.30.7", None),
        ("echo 2.29.7", "NCCL is 2.30.7 here and 2.29.7 in"),
        ("echo Traceback >&2; echo 'no torch' >&2; exit 1", "has no NCCL: no torch: make sglang"),
    ],
)
def test_servers_have_the_same_nccl(run, gpus: None, tmp_path: Path, python: str, part: str | None) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    lines = run(FOUR_GPUS)
    assert len(lines) == (part is not None)
    assert all(part in line for line in lines)


@pytest.mark.parametrize("arguments", [(), ("--before-setup",)])
def test_old_c_library(run, gpus: None, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.31")
    (line,) = run(FOUR_GPUS, *arguments)
    assert "glibc 2.31 is too old for SGLang, which needs 2.34" in line


def test_before_setup_one_gpu_and_no_torch_will_do(run) -> None:
    """A host with fewer GPUs than a run needs, whose port and directory are not yet known."""
    assert run("echo 580.95.05", "--before-setup", "--shared", "/proc/nowhere") == []
    (line,) = run("echo 535.129.03", "--before-setup")
    assert "NVIDIA driver 535.129.03 is too old for CUDA 13: install 580 or newer" in line


def test_port_is_taken(run, gpus: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (line,) = run(FOUR_GPUS, "--master-port", port)
        assert f"127.0.0.1:{port}: cannot be bound here (Address already in use)" in line
        # it is node 0's own affair
        assert run(FOUR_GPUS, "--master-port", port, "--node-rank", "1", "--nodes", "2") == []


def test_address_is_unknown(run, gpus: None) -> None:
    (line,) = run(FOUR_GPUS, "--master-addr", "no-such-host.invalid")
    assert "MASTER_ADDR is no-such-host.invalid" in line


def test_directory_cannot_be_written_to(run, gpus: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (line,) = run(FOUR_GPUS, "--shared", str(tmp_path / "file"))
    assert "cannot be written to" in line


def test_without_a_shared_directory_no_file_is_left(
    tool: ModuleType, gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tool.main(["--gpus", "4", "--master-port", str(free_port())])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stale", [False, True])
def test_a_node_is_missing(run, gpus: None, tmp_path: Path, tool: ModuleType, stale: bool) -> None:
    """A mark of an earlier start does not count."""
    port = str(free_port())
    if stale:
        mark = tmp_path / ".nodes" / f"127.0.0.1_{port}_1"
        mark.parent.mkdir()
        mark.write_text(repr(time.time()))
        os.utime(mark, (0, time.time() - 2 * tool.STALE_S))
    (line,) = run(FOUR_GPUS, "--nodes", "2", "--wait", "0.3", "--master-port", port)
    assert "nodes [1] did not show up" in line


@pytest.mark.parametrize(("offset", "failures"), [(0.0, 0), (-42.0, 1)])
def test_clock(run, gpus: None, tmp_path: Path, offset: float, failures: int) -> None:
    port = str(free_port())
    mark = tmp_path / ".nodes" / f"127.0.0.1_{port}_1"
    mark.parent.mkdir()
    mark.write_text(repr(time.time() + offset))
    lines = run(FOUR_GPUS, "--nodes", "2", "--master-port", port)
    assert len(lines) == failures
    assert all("node 1's clock is -42.0 s from node 0's" in line for line in lines)


def test_each_failure_has_its_own_line(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = run(None, "--shared", str(tmp_path / "file"), "--master-addr", "no-such-host.invalid")
    assert [part in line for line, part in zip(lines, ("nvidia-smi", "MASTER_ADDR", "file"), strict=True)]


def test_the_oldest_driver_is_that_of_a_run(tool: ModuleType) -> None:
    """The script must run before the package is installed, so it cannot read the package's."""
    assert tool.OLDEST_DRIVER == device.OLDEST_DRIVER
