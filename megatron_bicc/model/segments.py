"""Defines which rows attend to which keys: segments of a variable-length call, and the CPU kernel's tiles.

A CUDA kernel takes all segments of a call at once, by their boundaries. The CPU kernel takes a batch of
segments of equal length, so short segments of similar length are padded and computed together, as a tile:
profiled micro-batches of 144 segments take 8 calls, in a third (forward) to half (backward) of the time.

Shape suffixes: N rows of a call, Q query rows, K key rows, H query heads, G key-value heads, C channels,
S segments of a tile, L rows of each segment of a tile.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Query rows bounds_q[i]:bounds_q[i + 1] attend to keys bounds_k[i]:bounds_k[i + 1] only.

    The boundaries are on the host for CPU kernels and, as cumulative lengths, on the device for CUDA's. Made
    with tensors on the CPU; a micro-batch uploads them with its other tensors.
    """

    bounds_q: list[int]
    bounds_k: list[int]
    causal: bool
    """Row j of a segment attends only to its first j + 1 keys"""
    cu_q: Tensor
    """int32 [segments + 1], on the device"""
    cu_k: Tensor
    """int32 [segments + 1], on the device"""
    max_q: int
    max_k: int
    keyless_rows: Tensor | None
    """bool [Q]: rows whose segment has no keys; None if every segment has some"""
    window: int | None = None
    """Causal: the last row of a segment attends to its last `window` keys, the row before to those up to one
    key earlier, and so on"""

    @classmethod
    def of_themselves(cls, cu: np.ndarray) -> "Segments":
        """Returns causal attention of each segment to itself; cumulative lengths [segments + 1]."""
        lengths = np.diff(cu)
        # a segment without rows has no keys either: dropping it saves kernel work and changes nothing
        cu = np.concatenate([[0], lengths[lengths > 0].cumsum()])
        return cls._make(cu, cu, True)

    @classmethod
    def across(cls, cu_q: np.ndarray, cu_k: np.ndarray) -> "Segments":
        """Returns attention of each segment's queries to all its keys; cumulative lengths of both."""
        return cls._make(cu_q, cu_k, False)

    @classmethod
    def sliding(cls, cu_q: np.ndarray, cu_k: np.ndarray, window: int) -> "Segments":
        """Returns attention of each segment's queries to its last keys, one key more for every row.

        window: keys of a row, its own included. A segment has at least as many keys as queries.
        """
        return replace(cls._make(cu_q, cu_k, True), window=window)

    @classmethod
    def _make(cls, cu_q: np.ndarray, cu_k: np.ndarray, causal: bool) -> "Segments":
        q_lens, k_lens = np.diff(cu_q), np.diff(cu_k)
        # CUDA's kernel leaves rows without keys unwritten; the caller fills them in
        keyless = np.repeat(k_lens == 0, q_lens)
        return cls(
            bounds_q=cu_q.tolist(),
            bounds_k=cu_k.tolist(),
            causal=causal,
            cu_q=torch.from_numpy(cu_q.astype(np.int32)),
            cu_k=torch.from_numpy(cu_k.astype(np.int32)),
            max_q=int(q_lens.max(initial=0)),
            max_k=int(k_lens.max(initial=0)),
            keyless_rows=torch.from_numpy(keyless) if keyless.any() else None,
        )

    def ranges(self) -> list[tuple[slice, slice]]:
        """Returns the query rows and key rows of every segment that has both."""
        q, k = self.bounds_q, self.bounds_k
        pairs = [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]
        return [(rows, keys) for rows, keys in pairs if rows.stop > rows.start and keys.stop > keys.start]

    @cached_property
    def tiles(self) -> list["Tile"]:
        """The segments as tiles for the CPU kernel; computed once for all layers and passes."""
        if self.window is not None:
            return make_window_tiles(self.ranges(), self.window)
        return make_tiles(self.ranges(), self.causal)


@dataclass(frozen=True)
class VarlenCall:
    """A variable-length attention call: softmax(scale q k) v within each segment."""

    q_QHC: Tensor
    k_KGC: Tensor
    v_KGC: Tensor
    segments: Segments
    scale: float


LONGEST = 64
"""Longest segment, in rows, that shares a tile; copying a longer one costs more than a separate call"""
STEPS = 8
"""Padding bounds: a length is rounded up by at most 1 / STEPS of it, or to a multiple of STEPS"""


@dataclass(frozen=True)
class TileRows:
    """Maps the rows of a tile's segments to the rows of a call; all segments are padded to one length."""

    segments: int
    """S"""
    index: slice | Tensor
    """int64 [S * L]; padding repeats a segment's last row, so that its values are finite"""
    real: Tensor | None = None
    """int64: positions in `index` that are not padding; None with a slice, which has no padding"""
    padding: Tensor | None = None
    """int64: positions in `index` that are padding"""

    def take(self, x_NH: Tensor) -> Tensor:
        """Gathers [N, H, ...] -> [S, H, L, ...]; a view if the rows are a slice."""
        taken = x_NH[self.index] if self.real is None else x_NH.index_select(0, self.index)
        return taken.unflatten(0, (self.segments, -1)).transpose(1, 2)

    def take_gradient(self, x_NH: Tensor) -> Tensor:
        """Gathers the output's gradient, zero at the padding: a copied row must not count twice."""
        if self.real is None:
            return self.take(x_NH)
        taken = x_NH.index_select(0, self.index).index_fill_(0, self.padding, 0.0)
        return taken.unflatten(0, (self.segments, -1)).transpose(1, 2)

    def put(self, target_NH: Tensor, x_SHL: Tensor) -> None:
        """Scatters [S, H, L, ...] to its rows, without the padding."""
        x = x_SHL.transpose(1, 2).flatten(0, 1)
        if self.real is None:
            target_NH[self.index] = x
        else:
            target_NH.index_copy_(0, self.index[self.real], x.index_select(0, self.real))

    def add(self, target_NH: Tensor, x_SHL: Tensor) -> None:
        """Adds [S, H, L, ...] to its rows, without the padding. There must be padding or an index of rows."""
        rows = self.index[self.real]
        x = x_SHL.transpose(1, 2).flatten(0, 1).index_select(0, self.real)
        # a tile has no row twice
        target_NH.index_copy_(0, rows, target_NH.index_select(0, rows) + x)


@dataclass(frozen=True)
class Tile:
    """Segments that one call of the CPU kernel computes."""

    q: TileRows
    k: TileRows
    mask: Tensor | None = None
    """float32 [L of q, L of k], added to the scores: a window. Tiles with one may share keys with others."""


def make_tiles(segments: list[tuple[slice, slice]], causal: bool) -> list[Tile]:
    """Returns tiles that cover the segments, each given by its query rows and its keys.

    Only causal segments of their own rows are padded. Padding rows come last there, so the mask hides them
    from every real row, and their own gradient is zero: neither values nor gradients of real rows change.
    Without the mask a padded key would take a share of the softmax.
    """
    tiles, short = [], defaultdict(list)
    for rows, keys in segments:
        length = rows.stop - rows.start
        if causal and length <= LONGEST:
            short[_rounded_up(length)].append(rows)
        else:
            tiles.append(Tile(TileRows(1, rows), TileRows(1, keys)))
    # a causal segment attends to itself: its queries and keys are the same rows
    return tiles + [Tile(rows, rows) for rows in map(_padded, short.values(), short)]


def make_window_tiles(segments: list[tuple[slice, slice]], window: int) -> list[Tile]:
    """Returns tiles of attention to a window's keys, so that work and memory grow linearly with the rows.

    Segments are cut in blocks of about a window's rows. A block's keys are its rows' own and those of the
    window before them, which are other blocks' rows; a tile takes every second block, so that no key is in it
    twice. Padding rows and keys come last: the mask hides them from all real rows.
    """
    size, blocks = max(LONGEST, window), defaultdict(list)
    for rows, keys in segments:
        before = (keys.stop - keys.start) - (rows.stop - rows.start)
        for i, start in enumerate(range(rows.start, rows.stop, size)):
            block = slice(start, min(start + size, rows.stop))
            own = keys.start + before + (start - rows.start)
            first = max(keys.start, own - (window - 1))
            length = block.stop - block.start
            kind = (i % 2, own - first, _rounded_up(length))
            blocks[kind].append((block, slice(first, own + length)))
    tiles = []
    for (_, before, length), pairs in blocks.items():
        q = _padded([rows for rows, _ in pairs], length)
        k = _padded([keys for _, keys in pairs], before + length)
        tiles.append(Tile(q, k, window_mask(length, before + length, window, torch.device("cpu"))))
    return tiles


def window_mask(rows: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Returns float32 [rows, keys], to be added to scores: 0, or -inf where a row does not see a key.

    The last row's own key is the last one.
    """
    row, key = (torch.arange(n, device=device) for n in (rows, keys))
    behind = row[:, None] + (keys - rows) - key
    hidden = (behind < 0) | (behind >= window)
    return torch.zeros(rows, keys, device=device).masked_fill_(hidden, float("-inf"))


def _rounded_up(length: int) -> int:
    """Returns the length that a segment is padded to: few distinct lengths make few, large tiles."""
    step = max(STEPS, 2 ** (length.bit_length() - 1) // STEPS)
    return -(-length // step) * step


def _padded(segments: list[slice], length: int) -> TileRows:
    """Returns a tile with `length` rows for every segment."""
    first_S1 = np.array([[rows.start] for rows in segments])
    last_S1 = np.array([[rows.stop - 1] for rows in segments])
    index_SL = first_S1 + np.arange(length)
    is_real = (index_SL <= last_S1).ravel()
    return TileRows(
        segments=len(segments),
        index=torch.from_numpy(np.minimum(index_SL, last_S1).ravel()),
        real=torch.from_numpy(np.flatnonzero(is_real)),
        padding=torch.from_numpy(np.flatnonzero(~is_real)),
    )
