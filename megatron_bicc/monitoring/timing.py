"""Wall-clock seconds of a step, by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """`with clock("pack"):` adds the block's seconds to stage "pack"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of every stage as time/STAGE_s."""
        return {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
