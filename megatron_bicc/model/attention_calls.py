"""The attention calls of a context rank: which of its rows attend to which keys, and whose keys it needs.

A segment of a micro-batch is a prefix or a response. A context rank holds whole segments and chunks of
segments that are cut (packing.types.Chunks). Its rows attend to

    causal     the rows of their own chunk up to themselves
    shared     the rows of their own segment before their chunk; response rows, their side's prefix

Shared keys are those of prefixes and of segments that are cut. Any context rank may need them, so all of them
are sent to all. A response that is whole sends nothing. With one context rank the shared keys are its own
prefix rows, and nothing is sent.

No call has a row twice among its keys, so that their gradients are summed in a fixed order without atomics. A
rank has two chunks of a segment that is cut; both attend to the rows before the first, the second also to the
rows between their starts. These are two calls, in each of which the keys of a segment are in one piece.

Shape suffixes: N rows of the context rank, W its chunks; D sides and S responses of the whole micro-batch; K
shared keys; X chunks of all context ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bicc.model.segments import Segments
from megatron_bicc.packing.types import Chunks, MicroBatchLayout


@dataclass(frozen=True)
class SharedCall:
    """A call of rows against keys that other rows attend to as well."""

    rows: slice
    """Among the N rows"""
    keys: slice
    """Among the K shared keys"""
    segments: Segments


@dataclass(frozen=True)
class Exchange:
    """Rows whose keys and values the context ranks send to each other in every layer."""

    sent: Tensor
    """int64: the rows that this rank sends, filled up with row 0 to as many as any context rank sends"""
    count: int
    """How many of them are not filling"""
    keys: Tensor
    """int64 [K]: the shared keys of this rank's calls, one call after another, among the rows received. These
    are the rows sent by every context rank in turn."""


@dataclass(frozen=True)
class AttentionCalls:
    """Calls whose results, merged, are the attention of a context rank's rows. On the CPU until uploaded."""

    causal: Segments
    """Every chunk attends to itself; so does the padding"""
    shared: tuple[SharedCall, ...]
    exchange: Exchange | None
    """None: the shared keys are the first of this rank's own"""

    @classmethod
    def of_one_segment(cls, rows: int) -> "AttentionCalls":
        """Returns causal attention of rows to themselves; nothing is sent, whatever the context ranks."""
        return cls(Segments.of_themselves(np.array([0, rows], np.int32)), (), None)

    @classmethod
    def of(cls, layout: MicroBatchLayout, context_rank: int) -> "AttentionCalls":
        """Returns the calls of a context rank."""
        own = layout.chunks[context_rank]
        used = int(own.length_W.sum())
        lengths, first_W = np.append(own.length_W, own.num_rows - used), _starts(own.length_W)
        shared = _Shared(layout)
        pieces = [_to_prefixes(layout, own), *_to_own_segments(own, first_W)]
        calls, keys = [], [np.zeros(0, np.int64)]
        for piece in pieces:
            if piece.k_lengths.sum() == 0:  # kernels do not take calls without rows or keys
                continue
            first_key = sum(map(len, keys))
            keys.append(shared.rows(piece.k_segments, piece.k_starts, piece.k_lengths))
            segments = Segments.across(_offsets(piece.q_lengths), _offsets(piece.k_lengths))
            rows = slice(piece.first, piece.first + segments.bounds_q[-1])
            calls.append(SharedCall(rows, slice(first_key, first_key + len(keys[-1])), segments))
        exchange = None
        # every context rank finds the same here, so that all of them take part in every exchange
        if len(layout.chunks) > 1 and shared.most > 0:
            is_sent_W = shared.of_segment[own.segment_W]
            rows = ranges(first_W[is_sent_W], own.length_W[is_sent_W])
            sent = np.zeros(shared.most, np.int64)
            sent[: len(rows)] = rows
            exchange = Exchange(torch.from_numpy(sent), len(rows), torch.from_numpy(np.concatenate(keys)))
        return cls(Segments.of_themselves(_offsets(lengths)), tuple(calls), exchange)


class _Shared:
    """The rows that context ranks send: where each of them lies among the rows received."""

    def __init__(self, layout: MicroBatchLayout) -> None:
        segment_X, start_X, length_X = (
            np.concatenate([getattr(chunks, name) for chunks in layout.chunks])
            for name in ("segment_W", "start_W", "length_W")
        )
        rank_X = np.repeat(np.arange(len(layout.chunks)), [len(c.segment_W) for c in layout.chunks])
        self.of_segment = layout.shared_segments
        self._first = _starts(layout.segment_rows * self.of_segment)
        is_sent_X = self.of_segment[segment_X]
        segment_X, start_X, length_X, rank_X = (
            array[is_sent_X] for array in (segment_X, start_X, length_X, rank_X)
        )
        counts = np.bincount(rank_X, length_X, len(layout.chunks)).astype(np.int64)
        self.most = int(counts.max())
        """Rows that a context rank sends at most"""
        within_rank_X = _starts(length_X) - _starts(counts)[rank_X]
        self._received = np.empty(counts.sum(), np.int64)
        self._received[ranges(self._first[segment_X] + start_X, length_X)] = ranges(
            rank_X * self.most + within_rank_X, length_X
        )

    def rows(self, segments: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns int64: where parts of segments lie among the rows received, one part after another."""
        return self._received[ranges(self._first[segments] + starts, lengths)]


@dataclass(frozen=True)
class _Piece:
    """A shared call before its keys are found; parts of rows and of segments' rows, one after another."""

    first: int
    """First row"""
    q_lengths: np.ndarray
    k_segments: np.ndarray
    k_starts: np.ndarray
    k_lengths: np.ndarray


def _to_prefixes(layout: MicroBatchLayout, own: Chunks) -> _Piece:
    """Returns the call of response rows against their sides' prefixes."""
    sides = len(layout.cu_prefix) - 1
    is_response_W = own.segment_W >= sides
    side_W = layout.side_S[own.segment_W[is_response_W] - sides]
    rows_D = np.bincount(side_W, own.length_W[is_response_W], sides).astype(np.int64)
    (present,) = rows_D.nonzero()
    return _Piece(
        first=int(own.length_W[~is_response_W].sum()),
        q_lengths=rows_D[present],
        k_segments=present,
        k_starts=np.zeros_like(present),
        k_lengths=np.diff(layout.cu_prefix)[present],
    )


def _to_own_segments(own: Chunks, first_W: np.ndarray) -> list[_Piece]:
    """Returns the calls of chunks against the rows of their own segments before them.

    Call n has a segment's chunks from the nth on, counted from 0. Their keys are the rows from the start of
    chunk n - 1, or of the segment, to the start of chunk n. Rows between two such segments have no keys.
    """
    nth_W = np.arange(len(own.segment_W)) - np.searchsorted(own.segment_W, own.segment_W)
    last_W = np.searchsorted(own.segment_W, own.segment_W, side="right") - 1
    stop_W = (first_W + own.length_W)[last_W]
    from_W = np.where(nth_W > 0, np.roll(own.start_W, 1), 0)
    pieces = []
    for nth in range(nth_W.max(initial=-1) + 1):
        (at,) = ((nth_W == nth) & (own.start_W > from_W)).nonzero()
        if len(at) == 0:
            continue
        bounds = np.stack([first_W[at], stop_W[at]], 1).ravel()
        with_gaps = np.stack([own.start_W[at] - from_W[at], np.zeros_like(at)], 1).ravel()[:-1]
        q_lengths = np.diff(bounds)
        pieces.append(
            _Piece(
                first=int(bounds[0]),
                q_lengths=q_lengths[q_lengths > 0],
                k_segments=np.repeat(own.segment_W[at], 2)[:-1][q_lengths > 0],
                k_starts=np.repeat(from_W[at], 2)[:-1][q_lengths > 0],
                k_lengths=with_gaps[q_lengths > 0],
            )
        )
    return pieces


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Returns where each part begins if parts of these lengths lie one after another."""
    return _offsets(lengths)[:-1]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns int64: the numbers start, start + 1, ... of each part, one part after another."""
    return np.arange(lengths.sum()) + np.repeat(starts - _starts(lengths), lengths)
