"""Sliding windows in shared-prefix attention: a row attends to the last W keys of its sequence, its own too.

The sequence of a response is its prefix and itself. So its first W - 1 rows also see the end of the prefix:
row j, counted from 0, sees W - 1 - j of its rows. The end of the prefix, at most W - 1 rows, is copied in
front of the keys of every response, and one causal call with a window computes all rows. No call is merged
with another, unlike in attention over whole prefixes: there a copy of the prefix for every response would
cost what sharing it saves.

    keys      N + (sum over responses of min(W - 1, rows of its prefix))
    pairs     at most W for a row

Memory and work grow linearly with the rows. The gradient of a row that was copied is the sum over its copies,
in a fixed order and in at least float32, rounded once.

Shape suffixes: N rows of the micro-batch, K keys with their copies, S segments (prefixes, responses and
padding), X rows that are copied, Y places of a copied row among the keys, G key-value heads, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bicc.model.attention_calls import AttentionCalls, ranges
from megatron_bicc.model.segments import Segments


@dataclass(frozen=True)
class WindowCall:
    """The attention call of a sliding layer. On the CPU until uploaded."""

    segments: Segments
    """Of the N rows and the K keys"""
    key_rows: Tensor
    """int64 [K]: the row that each key is of"""
    own_keys: Tensor
    """int64 [N]: the key of each row that is not a copy"""
    copied_rows: Tensor
    """int64 [X]"""
    copies: Tensor
    """int64 [X, Y]: the keys of each copied row; filled up with key 0"""
    is_filling: Tensor
    """bool [X, Y, 1, 1]"""

    @classmethod
    def of(cls, calls: AttentionCalls, window: int) -> "WindowCall":
        """Returns the call of a layer whose rows see `window` keys, for the rows of a whole micro-batch.

        calls: those of layers without a window, on the only context rank.
        """
        bounds = np.array(calls.causal.bounds_q)
        start_S, rows_S = bounds[:-1], np.diff(bounds)
        before_S, stop_S = np.zeros_like(start_S), np.zeros_like(start_S)
        for call in calls.shared:
            sides = np.searchsorted(np.array(call.segments.bounds_q) + call.rows.start, start_S, "right") - 1
            (is_response,) = ((start_S >= call.rows.start) & (start_S < call.rows.stop)).nonzero()
            prefixes = np.array(call.segments.bounds_k)
            stop_S[is_response] = prefixes[sides[is_response] + 1]
            before_S[is_response] = np.minimum(np.diff(prefixes)[sides[is_response]], window - 1)
        bounds_k = np.concatenate([[0], np.cumsum(before_S + rows_S)])
        own_N = np.arange(bounds[-1]) + np.repeat(np.cumsum(before_S), rows_S)
        copy_keys = ranges(bounds_k[:-1], before_S)
        copy_rows = ranges(stop_S - before_S, before_S)
        key_rows = np.empty(bounds_k[-1], np.int64)
        key_rows[own_N], key_rows[copy_keys] = np.arange(bounds[-1]), copy_rows
        copied, copies = _places(copy_rows, copy_keys, own_N)
        return cls(
            segments=Segments.sliding(bounds, bounds_k, window),
            key_rows=torch.from_numpy(key_rows),
            own_keys=torch.from_numpy(own_N),
            copied_rows=torch.from_numpy(copied),
            copies=torch.from_numpy(np.maximum(copies, 0)),
            is_filling=torch.from_numpy(copies < 0)[:, :, None, None],
        )

    def keys(self, x_NGC: Tensor) -> Tensor:
        """Returns keys or values with their copies, [K, G, C]."""
        return x_NGC.index_select(0, self.key_rows)

    def gradient(self, grad_KGC: Tensor) -> Tensor:
        """Returns the gradient of `keys`: that of each row, [N, G, C], summed over its copies."""
        grad_NGC = grad_KGC.index_select(0, self.own_keys)
        if len(self.copied_rows) == 0:
            return grad_NGC
        grad_XYGC = grad_KGC.index_select(0, self.copies.flatten()).unflatten(0, self.copies.shape)
        wide = torch.promote_types(grad_KGC.dtype, torch.float32)
        sum_XGC = grad_XYGC.masked_fill_(self.is_filling, 0.0).sum(1, dtype=wide)
        return grad_NGC.index_copy_(0, self.copied_rows, sum_XGC.to(grad_NGC.dtype))


def _places(copy_rows: np.ndarray, copy_keys: np.ndarray, own_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (int64 [X]: the rows that are copied; int64 [X, Y]: the keys of each, -1 to fill it up)."""
    order = np.argsort(copy_rows, kind="stable")
    copied, first, counts = np.unique(copy_rows[order], return_index=True, return_counts=True)
    places = np.full((len(copied), 1 + counts.max(initial=0)), -1)
    places[:, 0] = own_N[copied]
    nth = np.arange(len(order)) - np.repeat(first, counts)
    places[np.repeat(np.arange(len(copied)), counts), 1 + nth] = copy_keys[order]
    return copied, places
