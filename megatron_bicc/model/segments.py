"""Short segments side by side, so that one call of the CPU's attention kernel computes many of them.

Shape suffixes: X rows of all segments, B segments of a tile, L rows that a tile has for each, H heads.

Boundaries of a variable-length attention call.

What every kernel of variable-length attention is called with.

Shape suffixes: Q query rows, K key rows, H query heads, G key-value heads, D head dimension.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

LONGEST = 64
"""Rows up to which segments share a tile; of a longer one, the copy costs more than a call of its own."""
STEPS = 8
"""Lengths are rounded up by at most 1 / STEPS, or to a multiple of STEPS."""


@dataclass(frozen=True)
class Rows:
    """Where a tile's rows lie among all rows. Short segments are padded by copies of their last row."""

    segments: int
    """B"""
    index: slice | Tensor
    """int64 [B * L]"""
    real: Tensor | None = None
    """int64: which of the B * L are not padding; None with a slice, which has none"""
    padding: Tensor | None = None
    """int64: which are"""

    def take(self, x_XH: Tensor) -> Tensor:
        """[X, H, ...] -> [B, H, L, ...]: a view where the rows are a slice."""
        taken = x_XH[self.index] if self.real is None else x_XH.index_select(0, self.index)
        return taken.unflatten(0, (self.segments, -1)).transpose(1, 2)

    def take_gradient(self, x_XH: Tensor) -> Tensor:
        """Likewise, with zeros for the padding."""
        if self.real is None:
            return self.take(x_XH)
        taken = x_XH.index_select(0, self.index).index_fill_(0, self.padding, 0.0)
        return taken.unflatten(0, (self.segments, -1)).transpose(1, 2)

    def put(self, target_XH: Tensor, x_BHL: Tensor) -> None:
        """Writes [B, H, L, ...] to the rows that it belongs to; padding is left out."""
        x = x_BHL.transpose(1, 2).flatten(0, 1)
        if self.real is None:
            target_XH[self.index] = x
        else:
            target_XH.index_copy_(0, self.index[self.real], x.index_select(0, self.real))


@dataclass(frozen=True)
class Tile:
    """Segments for one call of the kernel."""

    q: Rows
    k: Rows


def make_tiles(segments: list[tuple[slice, slice]], causal: bool) -> list[Tile]:
    """Tiles of segments, each given by its query rows and its keys.

    Only causal segments are padded: there the copies come after every real row, which does not see them.
    """
    tiles, short = [], defaultdict(list)
    for rows, keys in segments:
        length = rows.stop - rows.start
        if causal and length <= LONGEST:
            short[_rounded_up(length)].append(rows)
        else:
            tiles.append(Tile(Rows(1, rows), Rows(1, keys)))
    return tiles + [Tile(rows, rows) for rows in map(_padded, short.values(), short)]


def _rounded_up(length: int) -> int:
    step = max(STEPS, 2 ** (length.bit_length() - 1) // STEPS)
    return -(-length // step) * step


def _padded(segments: list[slice], length: int) -> Rows:
    """Rows of `length` for every segment."""
    first_B1 = np.array([[rows.start] for rows in segments])
    last_B1 = np.array([[rows.stop - 1] for rows in segments])
    index_BL = first_B1 + np.arange(length)
    is_real = (index_BL <= last_B1).ravel()
    parts = (np.minimum(index_BL, last_B1).ravel(), np.flatnonzero(is_real), np.flatnonzero(~is_real))
    return Rows(len(segments), *map(torch.from_numpy, parts))


@dataclass(frozen=True)
class Segments:
    """Boundaries on the host for CPU kernels, on the device for CUDA.

    Rows bounds_q[i]:bounds_q[i + 1] attend to keys bounds_k[i]:bounds_k[i + 1].
    """

    bounds_q: list[int]
    bounds_k: list[int]
    causal: bool
    """Row j of a segment sees its first j + 1 keys, and not all of them"""
    cu_q: Tensor
    """int32 [segments + 1], on the device"""
    cu_k: Tensor
    """int32 [segments + 1], on the device"""
    max_q: int
    max_k: int
    keyless_rows: Tensor | None
    """bool [queries]: rows whose segment has no keys; None where every segment has some"""

    @classmethod
    def of_themselves(cls, cu: np.ndarray, device: torch.device) -> "Segments":
        """Causal attention of segments to themselves; int32 cumulative lengths [segments + 1]."""
        lengths = np.diff(cu)
        cu = np.concatenate([[0], lengths[lengths > 0].cumsum()])
        return cls._make(cu, cu, True, device)

    @classmethod
    def across(cls, cu_q: np.ndarray, cu_k: np.ndarray, device: torch.device) -> "Segments":
        """Every query of a segment to all its keys; int32 cumulative lengths [segments + 1] of both."""
        return cls._make(cu_q, cu_k, False, device)

    @classmethod
    def _make(cls, cu_q: np.ndarray, cu_k: np.ndarray, causal: bool, device: torch.device) -> "Segments":
        q_lens, k_lens = np.diff(cu_q), np.diff(cu_k)
        keyless = np.repeat(k_lens == 0, q_lens)
        to_device = lambda cu: torch.from_numpy(cu.astype(np.int32)).to(device)  # noqa: E731
        return cls(
            bounds_q=cu_q.tolist(),
            bounds_k=cu_k.tolist(),
            causal=causal,
            cu_q=to_device(cu_q),
            cu_k=to_device(cu_k),
            max_q=int(q_lens.max(initial=0)),
            max_k=int(k_lens.max(initial=0)),
            keyless_rows=torch.from_numpy(keyless).to(device) if keyless.any() else None,
        )

    def ranges(self) -> list[tuple[slice, slice]]:
        """Query and key rows of every segment that has both."""
        q, k = self.bounds_q, self.bounds_k
        pairs = [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]
        return [(rows, keys) for rows, keys in pairs if rows.stop > rows.start and keys.stop > keys.start]

    @cached_property
    def tiles(self) -> list[Tile]:
        """The segments as the CPU kernel takes them; made once for all layers and passes."""
        return make_tiles(self.ranges(), self.causal)


@dataclass(frozen=True)
class VarlenCall:
    """Attention in which the rows of a segment see keys of that segment alone."""

    q_QHD: Tensor
    k_KGD: Tensor
    v_KGD: Tensor
    segments: Segments
    scale: float
    """Factor on q k"""
