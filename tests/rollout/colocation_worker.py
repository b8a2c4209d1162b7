"""Worker of test_colocation.py, on two processes: colocation_worker.py OUT SCENARIO.

Process 0 owns the rollout servers. Both append what they do to OUT/SCENARIO, a line each; process 1 is late.
`Pool` stands for the servers, and `unused_bytes` for the GPU, whose memory becomes free as a scenario says.
"""

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_bicc import device
from megatron_bicc.rollout import sglang_engine
from megatron_bicc.rollout.sglang_engine import SglangEngine
from megatron_bicc.rollout.types import RolloutError
from megatron_bicc.sglang.client import ServerUnavailable

LATE_S = 0.2
SERVER_BYTES = 60
UNUSED = {
    "well": [10, 60],
    "late": [10, 10, 12, 12, 30, 50, 60],
    "never": [10],
    "fails": [10],
}
"""By scenario: unused bytes of process 1's GPU at each look; the last for ever"""


def note(log: Path, event: str) -> None:
    """Appends a line, whole even if both processes write."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{dist.get_rank()} {event}\n".encode())
    os.close(file)


class Pool:
    """Test double of a ServerPool that notes its calls."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def release_memory(self) -> None:
        if dist.get_rank() == 0:
            note(self.log, "release")
            if self.log.name == "fails":
                raise ServerUnavailable("http://h:1", "/release_memory_occupation", "HTTP 500")

    def take_weights(self) -> None:
        if dist.get_rank() == 0:
            note(self.log, "take weights")


def main(log: Path) -> None:
    """One process's part of a scenario."""
    device.start_distributed()
    late = LATE_S if dist.get_rank() == 1 else 0
    looks = iter(UNUSED[log.name] if dist.get_rank() == 1 else [10, 60])
    last = [0]

    def unused_bytes() -> int:
        last[0] = next(looks, last[0])
        return last[0]

    device.free_memory = lambda: note(log, "free")
    device.unused_bytes = unused_bytes
    sglang_engine.RELEASE_TIMEOUT_S, sglang_engine.RELEASE_POLL_S = 0.5, 0.01
    engine = SglangEngine.__new__(SglangEngine)
    engine.pool, engine._server_bytes = Pool(log), SERVER_BYTES
    time.sleep(late)
    try:
        with engine.memory_released():
            note(log, f"train with {last[0]} bytes")
            time.sleep(late)
    except RolloutError as error:
        note(log, f"error: {error}")
    device.end_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]) / sys.argv[2])
