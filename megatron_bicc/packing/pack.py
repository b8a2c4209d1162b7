"""The packer: csrc behind NumPy arrays.

Shape suffixes: K channels, N response tokens of the batch, M micro-batches.
"""

from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_bicc import _C
from megatron_bicc.packing.plan import SideTable, StepPlan, step_stats
from megatron_bicc.packing.types import MicroBatch, PackingSettings, RolloutBatch

_CACHE_LINE = 64


def pack(
    batch: RolloutBatch,
    settings: PackingSettings,
    dp_size: int,
    threads: int = 0,
    channels_KN: np.ndarray | None = None,
) -> StepPlan:
    """Packs scored groups into the micro-batches of every data-parallel rank.

    The result does not depend on `threads`. Arrays are read in place; what supports DLPack will do.

    Args:
        batch: the scored groups.
        settings: layout, contexts and budgets.
        dp_size: number of data-parallel ranks.
        threads: threads that move tokens; 0: one for every million rows, up to the cores.
        channels_KN: float32 [K, response tokens], per-token data to be gathered into MicroBatch.channels.

    Raises:
        ValueError: an array, a setting or a response is not usable; the message names it, with its group
            and rollout.
    """
    arrays = {f.name: _as_numpy(f"RolloutBatch.{f.name}", getattr(batch, f.name)) for f in fields(batch)}
    batch = RolloutBatch(**arrays)
    plan = _C.Plan(batch, settings, dp_size)
    if channels_KN is None:
        channels_KN = np.empty((0, batch.tokens.size), np.float32)
    channels_KN = _as_numpy("channels", channels_KN)
    # channels of another shape are refused by fill, before anything is allocated for them
    fits = channels_KN.ndim == 2 and channels_KN.shape[1] == batch.tokens.size
    sizes_M5, channels = plan.sizes, len(channels_KN) if fits else 0
    buffers = _allocate(sizes_M5, channels)
    plan.fill(buffers, channels_KN, threads)
    micro_batches = _slice(buffers, sizes_M5, channels)
    per_rank = len(micro_batches) // dp_size
    ranks = [micro_batches[rank * per_rank : (rank + 1) * per_rank] for rank in range(dp_size)]
    counts = plan.counts
    stats = step_stats(counts, counts.pop("rank_costs"), settings)
    return StepPlan(ranks, stats, SideTable(**plan.side_table), batch, settings)


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


def _lengths(sizes_M5: np.ndarray, channels: int) -> dict[str, tuple[type, np.ndarray]]:
    """Returns, for each buffer, its dtype and its length in every micro-batch."""
    rows, prefix_rows, response_rows, sides, segments = sizes_M5.T
    padded = rows > prefix_rows + response_rows
    return {
        "tokens_T": (np.int32, rows),
        "positions_T": (np.int32, rows),
        "labels_T": (np.int32, rows),
        "cu_seqlens": (np.int32, sides + segments + padded + 1),
        "cu_prefix": (np.int32, sides + 1),
        "cu_response_side": (np.int32, sides + 1),
        "cu_response": (np.int32, segments + 1),
        "rollout_S": (np.int32, segments),
        "group_S": (np.int32, segments),
        "scale_S": (np.float32, segments),
        "gather": (np.int64, response_rows),
        "channels": (np.float32, channels * response_rows),
    }


def _allocate(sizes_M5: np.ndarray, channels: int) -> dict[str, np.ndarray]:
    """Returns the step's buffers, cut from one block: it gets huge pages, so page faults cost little."""
    lengths = _lengths(sizes_M5, channels)
    sizes = {
        name: int(lengths_M.sum()) * np.dtype(dtype).itemsize for name, (dtype, lengths_M) in lengths.items()
    }
    starts = np.cumsum([0, *(-(-size // _CACHE_LINE) * _CACHE_LINE for size in sizes.values())])
    block = np.empty(starts[-1], np.uint8)
    return {
        name: block[start : start + size].view(lengths[name][0])
        for (name, size), start in zip(sizes.items(), starts[:-1], strict=True)
    }


def _slice(buffers: dict[str, np.ndarray], sizes_M5: np.ndarray, channels: int) -> list[MicroBatch]:
    """Cuts the step's buffers into micro-batches: views, no copies."""
    views = {
        name: _cut(buffers[name], lengths_M) for name, (_, lengths_M) in _lengths(sizes_M5, channels).items()
    }
    return [
        MicroBatch(
            num_prefix_rows=prefix_rows,
            num_response_rows=response_rows,
            channels=views["channels"][i].reshape(channels, response_rows),
            **{name: view[i] for name, view in views.items() if name != "channels"},
        )
        for i, (_, prefix_rows, response_rows, _, _) in enumerate(sizes_M5.tolist())
    ]


def _cut(buffer: np.ndarray, lengths_M: np.ndarray) -> list[np.ndarray]:
    bounds = np.concatenate([[0], np.cumsum(lengths_M)]).tolist()
    return [buffer[start:stop] for start, stop in pairwise(bounds)]
