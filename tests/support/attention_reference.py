"""Shared-prefix attention's references: one causal row per response, and a mask over a whole micro-batch.

Shape suffixes as in megatron_bicc.model.attention.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_bicc import device
from megatron_bicc.model.attention import SharedPrefixAttention
from megatron_bicc.model.attention_calls import AttentionCalls
from megatron_bicc.packing.types import Chunks, MicroBatchLayout

Sides = Sequence[tuple[int, Sequence[int]]]
"""(prefix rows, rows of each response) of every side"""
Holders = Sequence[int | Sequence[int]]
"""For every segment the context rank that holds it, or, if it is cut, the rows that each rank holds"""


def cumulative(lengths: Sequence[int]) -> np.ndarray:
    """Returns offsets int32, one more than lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def segment_lengths(sides: Sides) -> list[int]:
    """Returns the rows of every segment: prefixes, then responses."""
    return [prefix for prefix, _ in sides] + [length for _, lengths in sides for length in lengths]


def divide(lengths: Sequence[int], holders: Holders, ranks: int, alignment: int = 1) -> tuple[Chunks, ...]:
    """Returns every context rank's chunks; of a cut segment rank r has chunks r and 2 ranks - 1 - r."""
    chunks: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for segment, (length, held) in enumerate(zip(lengths, holders, strict=True)):
        if isinstance(held, int):
            chunks[held].append((segment, 0, length))
            continue
        assert sum(held) == length
        start = 0
        for rank, rows in [(r, -(-n // 2)) for r, n in enumerate(held)] + [
            (r, n // 2) for r, n in reversed(list(enumerate(held)))
        ]:
            last = chunks[rank][-1] if chunks[rank] else (-1, 0, 0)
            if last[0] == segment and sum(last[1:]) == start:
                chunks[rank][-1] = (segment, last[1], last[2] + rows)
            else:
                chunks[rank].append((segment, start, rows))
            start += rows
    found = []
    for own in chunks:
        arrays = np.array([c for c in own if c[2] > 0], np.int32).reshape(-1, 3).T
        rows = int(arrays[2].sum())
        found.append(Chunks(max(1, -(-rows // alignment)) * alignment, *arrays))
    return tuple(found)


def lay_out(sides: Sides, chunks: tuple[Chunks, ...] | None = None) -> MicroBatchLayout:
    """Returns the layout of sides of one group each; by default one context rank holds all rows."""
    lengths, responses = segment_lengths(sides), [n for _, lengths in sides for n in lengths]
    prefix_rows = sum(prefix for prefix, _ in sides)
    chunks = chunks or (Chunks.of_whole(lengths, sum(lengths)),)
    rows = sum(own.num_rows for own in chunks)
    padding = [rows - sum(lengths)] if rows > sum(lengths) else []
    return MicroBatchLayout(
        num_rows=rows,
        num_prefix_rows=prefix_rows,
        num_response_rows=sum(responses),
        cu_seqlens=cumulative(lengths + padding),
        cu_prefix=cumulative([prefix for prefix, _ in sides]),
        cu_response_side=cumulative([sum(lengths) for _, lengths in sides]),
        cu_response=cumulative(responses),
        rollout_S=np.arange(len(responses), dtype=np.int32),
        group_S=np.repeat(np.arange(len(sides)), [len(lengths) for _, lengths in sides]).astype(np.int32),
        scale_S=np.ones(len(responses), np.float32),
        chunks=chunks,
    )


def rows_held(chunks: Chunks, lengths: Sequence[int]) -> Tensor:
    """Returns int64: the rows of a context rank, padding left out, among those of all segments in turn."""
    first = cumulative(lengths)
    each = zip(chunks.segment_W, chunks.start_W, chunks.length_W, strict=True)
    parts = [np.arange(first[s] + start, first[s] + start + length) for s, start, length in each]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))


def shared(q_NHC: Tensor, k_NGC: Tensor, v_NGC: Tensor, sides: Sides, scale: float) -> Tensor:
    """Returns the product's attention over prefix-major rows on one context rank, [N, H, C]."""
    return of_rank(q_NHC, k_NGC, v_NGC, lay_out(sides), None, scale)


def of_rank(
    q_NHC: Tensor,
    k_NGC: Tensor,
    v_NGC: Tensor,
    layout: MicroBatchLayout,
    group: dist.ProcessGroup | None,
    scale: float,
) -> Tensor:
    """Returns the product's attention of the rows that this process holds in a context group, [N, H, C]."""
    calls = AttentionCalls.of(layout, group.rank() if group else 0)
    calls = device.upload_tensors(calls, q_NHC.device)
    return SharedPrefixAttention.apply(q_NHC, k_NGC, v_NGC, calls, group, scale)


def dense(
    q_NHC: Tensor, k_NGC: Tensor, v_NGC: Tensor, sides: Sides, scale: float, window: int | None = None
) -> Tensor:
    """Returns the same over all rows, [N, H, C], by one softmax with a mask.

    window: how many tokens of its sequence a row sees, its own included.
    """
    lengths = segment_lengths(sides)
    segment_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    prefixes = list(range(len(sides)))
    prefix = prefixes + [side for side in prefixes for _ in sides[side][1]]
    prefix_N = torch.tensor(prefix)[segment_N]
    own = (segment_N[:, None] == segment_N) & torch.ones(len(segment_N), len(segment_N)).tril().bool()
    mask = own | ((segment_N[:, None] >= len(sides)) & (prefix_N[:, None] == segment_N))
    if window is not None:
        firsts = [0] * len(sides) + [sides[side][0] for side in prefix[len(sides) :]]
        ranges = [first + torch.arange(n) for first, n in zip(firsts, lengths, strict=True)]
        position_N = torch.cat(ranges)
        mask &= position_N[:, None] - position_N < window
    k, v = (x.repeat_interleave(q_NHC.shape[1] // x.shape[1], 1) for x in (k_NGC, v_NGC))
    scores = (torch.einsum("qhc,khc->hqk", q_NHC, k) * scale).masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), v)


def row_by_row(q_NHC: Tensor, k_NGC: Tensor, v_NGC: Tensor, sides: Sides, scale: float) -> Tensor:
    """Returns the same, [N, H, C], with every response behind a copy of its prefix."""
    outputs: list[Tensor] = [q_NHC[:0]] * sum(1 + len(lengths) for _, lengths in sides)
    prefix, response, segment = 0, sum(prefix for prefix, _ in sides), len(sides)
    for side, (rows, lengths) in enumerate(sides):
        for length in lengths:
            parts = slice(prefix, prefix + rows), slice(response, response + length)
            q, k, v = (
                torch.cat([x[part] for part in parts]).transpose(0, 1)[None] for x in (q_NHC, k_NGC, v_NGC)
            )
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            # every response computes the prefix's rows; the last one's are as good as any
            outputs[side], outputs[segment] = out[0].transpose(0, 1).split([rows, length])
            response, segment = response + length, segment + 1
        prefix += rows
    return torch.cat(outputs)


def differentiate(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], grad_NHC: Tensor
) -> list[Tensor]:
    """Returns [output, dq, dk, dv]."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    out.backward(grad_NHC)
    return [out.detach(), *(x.grad for x in leaves)]
