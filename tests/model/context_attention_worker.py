"""Run by torchrun: attention of micro-batches that are divided among context ranks.

torchrun --nproc-per-node 4 context_attention_worker.py REPORTS

Process n writes REPORTS/n: for every case of CASES and number of context ranks a `Found`, and for "benchmark"
what `tools/benchmark.py context` measures. Each process is the only context rank of one, each pair of
processes are the two of two.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.attention_reference import (
    Sides,
    differentiate,
    divide,
    lay_out,
    of_rank,
    rows_held,
    segment_lengths,
)
from support.model_parallel import leave_model_parallel

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.packing.types import MicroBatchLayout

SCALE, HEADS, CHANNELS = 0.3, 4, 16
RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """A micro-batch: segments of more than `whole` rows are cut, the others dealt in turn."""

    sides: Sides
    whole: int
    groups: int = 2
    """Key-value heads"""
    dtype: torch.dtype = torch.float64
    uneven: bool = False
    """Rank r gets about r + 1 times as many rows of a cut segment as rank 0"""
    empty: bool = False
    """The last context rank gets no rows"""

    def layout(self, ranks: int) -> MicroBatchLayout:
        """Returns the micro-batch divided among context ranks."""
        lengths, holding = segment_lengths(self.sides), max(1, ranks - self.empty)
        holders = [
            segment % holding if length <= self.whole else self._shares(length, holding, ranks)
            for segment, length in enumerate(lengths)
        ]
        return lay_out(self.sides, divide(lengths, holders, ranks, alignment=4))

    def _shares(self, length: int, holding: int, ranks: int) -> list[int]:
        parts = np.arange(1, holding + 1) if self.uneven else np.ones(holding, int)
        bounds = parts.cumsum() * length // parts.sum()
        return np.diff([0, *bounds, *[length] * (ranks - holding)]).tolist()

    def inputs(self) -> list[Tensor]:
        """Returns q, k, v and the output's gradient of all segments' rows."""
        random = torch.Generator().manual_seed(0)
        rows = sum(segment_lengths(self.sides))
        return [
            torch.randn(rows, heads, CHANNELS, generator=random, dtype=torch.float64).to(self.dtype)
            for heads in (HEADS, self.groups, self.groups, HEADS)
        ]


BILATERAL = [(21, [4, 40, 3]), (37, [26, 1]), (0, [5, 2]), (1, [1, 1, 33])]
PLAIN = [(70, [90, 3, 31, 1, 18])]
CASES = {
    "mixed": Case(BILATERAL, whole=12),
    "uneven": Case(BILATERAL, whole=12, uneven=True),
    "one side": Case(PLAIN, whole=20, uneven=True),
    "MHA": Case(PLAIN, whole=20, groups=HEADS),
    "one key-value head": Case(BILATERAL, whole=12, groups=1),
    "all cut": Case(BILATERAL, whole=0, uneven=True),
    "all whole": Case(BILATERAL, whole=1000),
    "a rank without rows": Case(BILATERAL, whole=12, empty=True),
    "a rank that shares nothing": Case([(60, [5, 4, 3, 2]), (0, [7, 8])], whole=1000),
    "nothing shared": Case([(0, [5, 2, 9]), (0, [3, 1])], whole=1000),
    "padding": Case([], whole=0),
    "fp32": Case(BILATERAL, whole=12, dtype=torch.float32),
    "bf16": Case(BILATERAL, whole=12, uneven=True, dtype=torch.bfloat16),
}


class Found(TypedDict):
    """What one process computed."""

    rows: Tensor
    """int64: its rows among those of all segments"""
    values: list[Tensor]
    """Output, dq, dk, dv of these rows"""
    repeats: bool
    """The same to the bit when computed again"""
    received: dict[str, int]
    """Bytes from other processes, by collective"""


class Wire:
    """Counts the bytes that the collectives of attention bring to this process."""

    def __init__(self) -> None:
        self.received: dict[str, int] = {}
        for name in ("all_gather_into_tensor", "all_to_all_single"):
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, collective: Any) -> Any:
        def counting(output: Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
            own = output.nbytes // group.size()
            self.received[name] = self.received.get(name, 0) + output.nbytes - own
            return collective(output, *args, group=group, **kwargs)

        return counting


def groups() -> Iterator[tuple[int, dist.ProcessGroup | None]]:
    """Yields every number of context ranks with the group that this process is in."""
    for ranks in RANKS:
        found = [dist.new_group(list(range(i, i + ranks))) for i in range(0, RANKS[-1], ranks)]
        yield ranks, found[dist.get_rank() // ranks]


def compute(case: Case, group: dist.ProcessGroup, wire: Wire) -> Found:
    """Computes the attention of this process's rows twice."""
    layout = case.layout(group.size())
    own = layout.chunks[group.rank()]
    rows = rows_held(own, segment_lengths(case.sides))
    # padding: values that would be seen if they reached a row
    inputs = [torch.full((own.num_rows, *x.shape[1:]), 7.0, dtype=x.dtype) for x in case.inputs()]
    for padded, whole in zip(inputs, case.inputs(), strict=True):
        padded[: len(rows)] = whole[rows]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return of_rank(q, k, v, layout, group, SCALE)

    wire.received = {}
    once = differentiate(attention, inputs[:3], inputs[3])
    received = dict(wire.received)
    again = differentiate(attention, inputs[:3], inputs[3])
    repeats = all(map(torch.equal, once, again))
    return Found(rows=rows, values=[x[: len(rows)] for x in once], repeats=repeats, received=received)


def benchmark(ranks: int) -> dict[str, float]:
    """Returns what `tools/benchmark.py context` measures on this process, at a small size."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from benchmarks import context

    config = Config()
    config.parallel.context = ranks
    start_model_parallel(config)
    figures = context.measure_rank(Namespace(tokens=601, layers=2, hidden=128))
    leave_model_parallel()
    return figures


def main(reports: str) -> None:
    """Computes all cases."""
    device.start_distributed()
    wire, found = Wire(), {}
    for ranks, group in groups():
        found |= {(name, ranks): compute(case, group, wire) for name, case in CASES.items()}
    found |= {("benchmark", ranks): benchmark(ranks) for ranks in RANKS}
    torch.save(found, Path(reports, str(dist.get_rank())))
    device.end_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
