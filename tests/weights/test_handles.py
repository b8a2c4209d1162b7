"""Tests the memory that servers of the same host read: what they find in it, and that no file of it stays.

weights/test_weight_sync_servers.py has the same with real servers.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from megatron_bicc.weights.handles import SHARED_MEMORY, SharedMemory, flatten
from megatron_bicc.weights.transport import Bucket, TensorTransport, WeightSyncError

REPOSITORY = Path(__file__).parents[2]
READER = """
import pickle, sys, torch

while size := sys.stdin.buffer.readline():
    payload = pickle.loads(sys.stdin.buffer.read(int(size)))
    flat, found = payload["flattened_tensor"], []
    for entry in payload["metadata"]:
        tensor = flat[entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)
        found.append(f"{entry.name} {tuple(tensor.shape)} {tensor.dtype} {tensor.double().sum().item()}")
    print(*found, sep=", ", flush=True)
    if "hold" not in sys.argv:
        del payload, flat, tensor
if "hold" in sys.argv:
    del payload, flat, tensor
"""
"""A double of a server: reads payloads, each after a line with its length, and prints what it finds"""


class Reader:
    """A process that is not related to the tensors' owner."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-W", "ignore", "-c", READER, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self, payload: bytes) -> str:
        """Returns the reader's line."""
        self.process.stdin.write(b"%d\n" % len(payload) + payload)
        self.process.stdin.flush()
        return self.process.stdout.readline().decode().strip()


@pytest.fixture(scope="module")
def readers() -> Iterator[list[Reader]]:
    """Two, such as the tensor-parallel ranks of a server."""
    both = [Reader(), Reader()]
    yield both
    for reader in both:
        reader.process.communicate()


def expected(tensors: list[tuple[str, torch.Tensor]]) -> str:
    return ", ".join(f"{n} {tuple(t.shape)} {t.dtype} {t.double().sum().item()}" for n, t in tensors)


def files(pid: int) -> list[Path]:
    """A process's files in /dev/shm."""
    return list(SHARED_MEMORY.glob(f"torch_{pid}_*"))


def until_gone(file: Path) -> None:
    end = time.monotonic() + 30
    while file.exists():
        assert time.monotonic() < end, f"{file} is still there"
        time.sleep(0.05)


def test_each_reader_finds_every_tensor(readers: list[Reader]) -> None:
    """Of any type and size, in one bucket after another; a larger one gets new memory. A payload has a few
    hundred bytes, and a reader that fails before it reads one does not take it from the others."""
    with closing(SharedMemory()) as memory:
        for count in (3, 5, 4, 50_000):
            tensors = [
                ("a", torch.rand(count).bfloat16()),
                ("b", torch.rand(count, 3)),
                ("c", torch.randn(7)),
                ("d", torch.tensor(float(count), dtype=torch.float64)),
            ]
            flat = flatten(tensors, memory)
            unread, *payloads = [flat.payload() for _ in (None, *readers)]
            assert [reader.read(p) for reader, p in zip(readers, payloads, strict=True)] == 2 * [
                expected(tensors)
            ]
            for _ in range(4):
                for_both = flat.payload(readers=2)
                assert [reader.read(for_both) for reader in readers] == 2 * [expected(tensors)]
            assert len(unread) < 1500
            assert len(files(os.getpid())) == 1
    assert not files(os.getpid())
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


def test_a_server_that_still_holds_removed_memory_ends_well() -> None:
    """Its request has timed out, and the trainer has ended."""
    reader = Reader("hold")
    with closing(SharedMemory()) as memory:
        flat = flatten([("a", torch.ones(9))], memory)
        assert reader.read(flat.payload()) == "a (9,) torch.float32 9.0"
        del flat
    assert not files(os.getpid())
    reader.process.communicate()
    assert reader.process.returncode == 0


def test_no_file_stays_when_the_trainer_is_killed() -> None:
    """Even while a server has it open."""
    program = """
import os, sys, torch
from megatron_bicc.weights.handles import SharedMemory, flatten
memory = SharedMemory()
flat = flatten([("a", torch.ones(9))], memory)
payload = flat.payload()
sys.stdout.buffer.write(b"%d\\n" % len(payload) + payload)
sys.stdout.flush()
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
    reader = Reader("hold")
    size = int(trainer.stdout.readline())
    assert reader.read(trainer.stdout.read(size)) == "a (9,) torch.float32 9.0"
    (file,) = files(trainer.pid)
    trainer.communicate(b"\n")
    assert trainer.returncode == -9
    until_gone(file)
    reader.process.communicate()
    assert reader.process.returncode == 0


def test_a_bucket_that_shared_memory_has_no_room_for_is_refused() -> None:
    transport = TensorTransport(lambda *_: pytest.fail("something is sent"))
    bucket = Bucket([("w", torch.empty(2**42, dtype=torch.uint8, device="meta"))])
    with closing(transport), pytest.raises(WeightSyncError) as refusal:
        transport.stage(bucket)
    message = str(refusal.value)
    assert message.startswith("weight sync: 4194304 MiB needed in /dev/shm, ")
    assert message.endswith(" MiB free; give it more (docker run --shm-size), or lower weight_sync.bucket_mb")
    assert not files(os.getpid())
