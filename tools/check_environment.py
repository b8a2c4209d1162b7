#!/usr/bin/env python
"""Checks that a host can take part in a run: GPUs and driver, NCCL, port, shared directory, clock.

tools/check_environment.py --gpus 8 --nodes 4 --node-rank 0 --master-addr host0 --shared runs/x

Run it on all hosts at the same time. It prints one line per failure on stderr and exits with status 1, or
with 0 if all checks pass. --before-setup checks only what the packages of a host with GPUs need. Directory
and clocks are checked with --shared only: each host leaves a small file there.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

OLDEST_DRIVER = 580
"""The oldest driver branch that runs CUDA 13, for which the locked torch and SGLang are built"""
OLDEST_GLIBC = (2, 34)
"""What the wheel of the locked SGLang is built for"""
OLDEST_NCCL = (2, 18)
STALE_S = 900.0
"""A file of another host that is this much older than this host's is from an earlier start"""


class Failure(Exception):
    """A failed check, one line: what is wrong and what to do."""


def main(argv: list[str]) -> int:
    """Runs the checks in order; the NCCL check needs a GPU and is skipped without one."""
    arguments = _parser().parse_args(argv)
    failures: list[str] = []
    has_gpus = _run(check_gpus, arguments, failures)
    _run(check_glibc, arguments, failures)
    if not arguments.before_setup:
        if has_gpus and _run(check_nccl, arguments, failures):
            _run(check_same_nccl, arguments, failures)
        _run(check_port, arguments, failures)
        if arguments.shared and _run(check_shared_directory, arguments, failures):
            _run(check_clocks, arguments, failures)
    for line in failures:
        print(f"{socket.gethostname()}: {line}", file=sys.stderr)
    return 1 if failures else 0


def _run(
    check: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, failures: list[str]
) -> bool:
    try:
        check(arguments)
    except Failure as failure:
        failures.append(str(failure))
        return False
    return True


def check_gpus(arguments: argparse.Namespace) -> None:
    """Checks that the driver answers, is new enough, and sees enough GPUs."""
    versions = driver_versions()
    if len(versions) < arguments.gpus and not arguments.before_setup:
        raise Failure(f"{len(versions)} GPUs, {arguments.gpus} needed: set GPUS_PER_NODE")
    if branch(versions[0]) < OLDEST_DRIVER:
        raise Failure(
            f"NVIDIA driver {versions[0]} is too old for CUDA 13: install {OLDEST_DRIVER} or newer, or train "
            "on the CPU with MEGATRON_BICC_DEVICE=cpu"
        )


def branch(version: str) -> int:
    """Returns the branch of a driver's version, such as 580 of 580.95.05."""
    return int(version.partition(".")[0])


def driver_versions() -> list[str]:
    """Returns the driver's version once for each GPU. Raises Failure if nvidia-smi names none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise Failure(
            "no NVIDIA GPU: nvidia-smi is not installed; DRY_RUN=1 checks the run without one"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Failure("nvidia-smi does not answer within 60 s: restart the host or its driver") from error
    if done.returncode:
        reason = (done.stdout + done.stderr).strip().partition("\n")[0]
        raise Failure(f"nvidia-smi fails: {reason}: install or restart the NVIDIA driver")
    versions = done.stdout.split()
    if not versions or not all(re.fullmatch(r"[0-9]+(\.[0-9]+)*", version) for version in versions):
        answer = done.stdout.strip().partition("\n")[0]
        raise Failure(
            f"nvidia-smi answers {answer[:100]!r} instead of the driver's version: install or restart the "
            "NVIDIA driver"
        )
    return versions


def check_glibc(arguments: argparse.Namespace) -> None:
    """Checks that the C library is new enough for SGLang's wheel."""
    name, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
    if tuple(map(int, version.split("."))) < OLDEST_GLIBC:
        needed = ".".join(map(str, OLDEST_GLIBC))
        raise Failure(
            f"{name} {version} is too old for SGLang, which needs {needed}: use Debian 12, Ubuntu 22.04, "
            "RHEL 9 or newer, or a container of one"
        )


def check_nccl(arguments: argparse.Namespace) -> None:
    """Checks that torch is a CUDA build, sees the GPUs, and has a recent NCCL."""
    # imported late: it takes seconds, and a host without a driver fails before
    import torch

    if torch.version.cuda is None:
        raise Failure("torch is a CPU build: install a CUDA build (make setup takes one if it finds a GPU)")
    if torch.cuda.device_count() < arguments.gpus:
        raise Failure(
            f"torch sees {torch.cuda.device_count()} GPUs, {arguments.gpus} needed: "
            "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for "
            f"CUDA {torch.version.cuda}"
        )
    if not torch.distributed.is_nccl_available():
        raise Failure("torch has no NCCL: install a build with it")
    version = torch.cuda.nccl.version()
    if version[:2] < OLDEST_NCCL:
        raise Failure(
            f"NCCL {'.'.join(map(str, version))} is too old: {OLDEST_NCCL[0]}.{OLDEST_NCCL[1]} needed"
        )


def check_same_nccl(arguments: argparse.Namespace) -> None:
    """Checks that the environment of the rollout servers, if it is here, has the trainer's NCCL.

    NCCL refuses a communicator of different versions: weight_sync.method=distributed would fail.
    """
    import torch

    if not Path(arguments.sglang_python).exists():
        return
    command = [arguments.sglang_python, "-c", "import torch; print(*torch.cuda.nccl.version(), sep='.')"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failure(f"{arguments.sglang_python} has no NCCL: {reason}: make sglang on a host with GPUs")
    own = ".".join(map(str, torch.cuda.nccl.version()))
    if done.stdout.strip() != own:
        raise Failure(
            f"NCCL is {own} here and {done.stdout.strip()} in {arguments.sglang_python}: make setup and make "
            "sglang install the same; NCCL refuses to connect different versions"
        )


def check_port(arguments: argparse.Namespace) -> None:
    """Checks that every host resolves host 0, and that the rendezvous port is free there."""
    address, port = arguments.master_addr, arguments.master_port
    try:
        host = socket.gethostbyname(address)
    except OSError as error:
        raise Failure(f"MASTER_ADDR is {address}: the name cannot be resolved") from error
    if arguments.node_rank:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError as error:
            raise Failure(f"MASTER_PORT is {port}: it must be within 1 and 65535") from error
        except PermissionError as error:
            raise Failure(f"MASTER_PORT is {port}: not allowed; choose one from 1024 on") from error
        except OSError as error:
            raise Failure(
                f"MASTER_ADDR:MASTER_PORT is {address}:{port}: cannot be bound here ({error.strerror}): "
                "choose a free port, and as address one of node 0's own"
            ) from error


def check_shared_directory(arguments: argparse.Namespace) -> None:
    """Checks that a file from every host appears in the shared directory."""
    mark = _mark(arguments, arguments.node_rank)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(repr(time.time()))
    except OSError as error:
        raise Failure(f"{arguments.shared} cannot be written to: {error.strerror}: set OUT") from error
    deadline, missing = time.monotonic() + arguments.wait, [0]
    while missing:
        missing = [n for n in range(arguments.nodes) if not _is_fresh(_mark(arguments, n), mark)]
        if missing and time.monotonic() > deadline:
            raise Failure(
                f"nodes {missing} did not show up in {arguments.shared} within {arguments.wait:.0f} s: "
                "start the script on all nodes at the same time, with OUT on a file system that they share"
            )
        time.sleep(0.2 if missing else 0)


def check_clocks(arguments: argparse.Namespace) -> None:
    """Checks that no clock is far from node 0's; each is compared with that of the file server."""
    offsets = []
    for node in range(arguments.nodes):
        mark = _mark(arguments, node)
        offsets.append(float(mark.read_text()) - mark.stat().st_mtime)
    for node, offset in enumerate(offsets):
        skew = offset - offsets[0]
        if abs(skew) > arguments.max_skew:
            raise Failure(f"node {node}'s clock is {skew:+.1f} s from node 0's: synchronize them (NTP)")


def _mark(arguments: argparse.Namespace, node: int) -> Path:
    return Path(arguments.shared) / ".nodes" / f"{arguments.master_addr}_{arguments.master_port}_{node}"


def _is_fresh(mark: Path, own: Path) -> bool:
    try:
        # the file may be visible before its content
        return mark.stat().st_size > 0 and mark.stat().st_mtime > own.stat().st_mtime - STALE_S
    except OSError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before-setup", action="store_true", help="check only driver and C library")
    parser.add_argument(
        "--sglang-python", default=".venv-sglang/bin/python", help="Python of the rollout servers"
    )
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that this host needs")
    parser.add_argument("--nodes", type=int, default=1, help="number of hosts")
    parser.add_argument("--node-rank", type=int, default=0, help="rank of this host, from 0")
    parser.add_argument("--master-addr", default="127.0.0.1", help="address of host 0")
    parser.add_argument("--master-port", type=int, default=29500, help="port of host 0 that must be free")
    parser.add_argument("--shared", help="directory shared by all hosts")
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for the other hosts")
    parser.add_argument(
        "--max-skew", type=float, default=5, help="largest difference of two clocks in seconds"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
