"""What a packed micro-batch holds, side by side: for pictures and for people."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_bicc.packing.types import MicroBatch


@dataclass(frozen=True)
class PackedSide:
    """A prefix and the responses behind it, within one micro-batch."""

    group: int
    prefix_rows: int
    rollouts: tuple[int, ...]
    """Index in the batch of each response's rollout"""
    response_rows: tuple[int, ...]
    """Rows of each response"""


def packed_sides(micro_batch: MicroBatch) -> list[PackedSide]:
    """The sides of a micro-batch in the order of their rows: all prefixes, all responses, then padding."""
    prefix_rows = np.diff(micro_batch.cu_prefix).tolist()
    response_rows = np.diff(micro_batch.cu_response)
    # segments of side d: those that begin at or after its first response row, before the next side's
    first = np.searchsorted(micro_batch.cu_response[:-1], micro_batch.cu_response_side)
    return [
        PackedSide(
            group=int(micro_batch.group_S[start]),
            prefix_rows=rows,
            rollouts=tuple(micro_batch.rollout_S[start:stop].tolist()),
            response_rows=tuple(response_rows[start:stop].tolist()),
        )
        for rows, (start, stop) in zip(prefix_rows, pairwise(first.tolist()), strict=True)
    ]
