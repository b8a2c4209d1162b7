"""Simulates two hosts by network namespaces with a link that can be cut. Needs root and iproute2."""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("bicc_a", "bicc_b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """Returns why this machine cannot simulate two hosts; empty if it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts need root and iproute2"
    with_one = subprocess.run(["ip", "netns", "add", "bicc_try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", "bicc_try"], capture_output=True)
    return "" if with_one.returncode == 0 else f"no network namespaces: {with_one.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[None]:
    """Creates both hosts and their link; removes them afterwards, with every process on them."""
    remove_hosts()
    for name in NAMES:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    _ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
    try:
        yield
    finally:
        remove_hosts()


def remove_hosts() -> None:
    """Kills all processes on the hosts and removes the hosts, if they exist."""
    for host, name in enumerate(NAMES):
        kill_host(host)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def cut_cable() -> None:
    """Cuts the link: packets are lost silently, as on an unplugged cable."""
    _ip("-n", NAMES[0], "link", "set", "eth0", "down")


def mend_cable() -> None:
    """Restores the link."""
    _ip("-n", NAMES[0], "link", "set", "eth0", "up")


def kill_host(host: int) -> None:
    """Sends SIGKILL to every process on a host."""
    pids = subprocess.run(["ip", "netns", "pids", NAMES[host]], capture_output=True, text=True).stdout
    for pid in pids.split():
        os.kill(int(pid), signal.SIGKILL)


def move_to_host(host: int) -> None:
    """Moves this process, and all that it starts later, to that host."""
    with open(f"/var/run/netns/{NAMES[host]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
