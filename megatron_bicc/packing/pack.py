"""The packer: plans a step and fills its micro-batches in C++ (csrc), on NumPy arrays.

Shape suffixes: A response rows, N rows, M micro-batches, S segments, W chunks of a context rank.
"""

from dataclasses import dataclass, fields
from itertools import accumulate, pairwise, repeat, starmap
from typing import Any

import numpy as np

from megatron_bicc import _C
from megatron_bicc.packing.types import (
    Chunks,
    MicroBatch,
    MicroBatchLayout,
    PackingSettings,
    RolloutBatch,
    SideTable,
    StepPlan,
    step_stats,
)

_CACHE_LINE = 64


@dataclass(frozen=True)
class Packed:
    """A packed step, as held by one context rank of a data-parallel rank."""

    plan: StepPlan
    """The whole step: the micro-batches of all ranks, without their rows"""
    micro_batches: list[MicroBatch]
    """The rank's, in the order of plan.ranks[rank], with the context rank's rows"""


def pack(
    batch: RolloutBatch,
    settings: PackingSettings,
    dp_size: int,
    rank: int,
    threads: int = 0,
    context_rank: int = 0,
) -> Packed:
    """Plans the step for all data-parallel ranks and fills one's micro-batches with a context rank's rows.

    The plan is the same on every rank. The result does not depend on `threads`. Arrays are read in place;
    anything that supports DLPack is accepted.

    Args:
        batch: the scored groups.
        settings: layout, contexts and budgets.
        dp_size: number of data-parallel ranks.
        rank: the data-parallel rank whose micro-batches are filled.
        threads: threads that copy tokens; 0: one per million rows, at most one per core.
        context_rank: the context rank whose rows are filled, of settings.context_ranks.

    Raises:
        ValueError: an array, a setting or a response cannot be used; the message names it, with group and
            rollout.
    """
    native, plan = make_plan(batch, settings, dp_size)
    return Packed(plan, _fill_rows(native, plan, rank, context_rank, threads))


def plan_step(batch: RolloutBatch, settings: PackingSettings, dp_size: int) -> StepPlan:
    """Plans a step for all ranks, as `pack` does, without copying a token. Raises as `pack` does."""
    return make_plan(batch, settings, dp_size)[1]


def make_plan(batch: RolloutBatch, settings: PackingSettings, dp_size: int) -> tuple[_C.Plan, StepPlan]:
    """Returns csrc's plan of a step, which can be filled, and what it holds; raises as `pack` does."""
    arrays = {f.name: _as_numpy(f"RolloutBatch.{f.name}", getattr(batch, f.name)) for f in fields(batch)}
    batch = RolloutBatch(**arrays)
    native = _C.Plan(batch, settings, dp_size)
    return native, _step_plan(native, batch, settings, dp_size)


def _as_numpy(name: str, array: Any) -> np.ndarray:
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, whose mask the packer would not see; give a plain one")
    if isinstance(array, np.ndarray):
        return array
    try:
        return np.from_dlpack(array)
    except (AttributeError, TypeError, BufferError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a NumPy array or a CPU tensor that supports DLPack: {error}"
        ) from error


def _step_plan(native: _C.Plan, batch: RolloutBatch, settings: PackingSettings, dp_size: int) -> StepPlan:
    sizes_M5 = native.sizes
    rows_M, prefix_M, response_M, sides_M, segments_M = sizes_M5.T
    padded_M = rows_M > prefix_M + response_M
    lengths: Lengths = [
        ({"cu_seqlens": np.int32}, sides_M + segments_M + padded_M + 1),
        ({"cu_prefix": np.int32, "cu_response_side": np.int32}, sides_M + 1),
        ({"cu_response": np.int32}, segments_M + 1),
        ({"rollout_S": np.int32, "group_S": np.int32, "scale_S": np.float32}, segments_M),
    ]
    share_rows, share_chunks = native.shares.T  # of every context rank of every micro-batch
    chunk_lengths: Lengths = [(dict.fromkeys(("segment_W", "start_W", "length_W"), np.int32), share_chunks)]
    buffers = _allocate(lengths + chunk_lengths)
    native.fill_segments(buffers)
    chunks = map(Chunks, share_rows.tolist(), *_views(buffers, chunk_lengths).values())
    # by position, which is fast: a step can have thousands
    layouts = list(
        map(
            MicroBatchLayout,
            rows_M.tolist(),
            prefix_M.tolist(),
            response_M.tolist(),
            *_views(buffers, lengths).values(),
            zip(*repeat(chunks, settings.context_ranks), strict=True),
        )
    )
    per_rank = len(layouts) // dp_size
    ranks = [layouts[rank * per_rank : (rank + 1) * per_rank] for rank in range(dp_size)]
    counts = native.counts
    stats = step_stats(counts, counts.pop("rank_costs"), settings)
    return StepPlan(ranks, stats, SideTable(**native.side_table), batch, settings)


def _fill_rows(
    native: _C.Plan, plan: StepPlan, rank: int, context_rank: int, threads: int
) -> list[MicroBatch]:
    rows_M, response_M = native.rows(rank, context_rank).T
    lengths: Lengths = [
        (dict.fromkeys(("tokens_N", "positions_N", "labels_N"), np.int32), rows_M),
        ({"gather_A": np.int64}, response_M),
    ]
    buffers = _allocate(lengths)
    native.fill_rows(rank, context_rank, buffers, threads)
    views = _views(buffers, lengths).values()
    return [
        MicroBatch(*vars(layout).values(), *rows, context_rank)
        for layout, *rows in zip(plan.ranks[rank], *views, strict=True)
    ]


Lengths = list[tuple[dict[str, type], np.ndarray]]
"""Buffers by name with their dtypes, and the number of items that each has per micro-batch, int64 [M]"""


def _allocate(lengths: Lengths) -> dict[str, np.ndarray]:
    """Returns the buffers as views of one block, which gets huge pages, so page faults cost little."""
    places, end = {}, 0
    for dtypes, lengths_M in lengths:
        count = int(lengths_M.sum())
        for name, dtype in dtypes.items():
            places[name] = dtype, slice(end, end + count * np.dtype(dtype).itemsize)
            end = -(-places[name][1].stop // _CACHE_LINE) * _CACHE_LINE
    block = np.empty(end, np.uint8)
    return {name: block[place].view(dtype) for name, (dtype, place) in places.items()}


def _views(buffers: dict[str, np.ndarray], lengths: Lengths) -> dict[str, list[np.ndarray]]:
    """Returns every micro-batch's array of each name, by name in the order of `lengths`: views, no copies."""
    views = {}
    for dtypes, lengths_M in lengths:
        parts = list(starmap(slice, pairwise(accumulate(lengths_M.tolist(), initial=0))))
        for name in dtypes:
            views[name] = list(map(buffers[name].__getitem__, parts))
    return views
