"""Shared-prefix attention's reference: one causal row per response, by torch's own attention and autograd.

Shape suffixes as in megatron_bicc.model.attention.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_bicc.model.attention import SharedPrefixAttention
from megatron_bicc.model.segments import Segments

Sides = Sequence[tuple[int, Sequence[int]]]
"""(prefix rows, rows of each response) of every side"""


def cumulative(lengths: Sequence[int]) -> np.ndarray:
    """Returns offsets int32, one more than lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def shared(q_NHC: Tensor, k_NGC: Tensor, v_NGC: Tensor, sides: Sides, scale: float) -> Tensor:
    """Returns the product's attention over prefix-major rows, [N, H, C]."""
    prefixes = [prefix for prefix, _ in sides]
    responses = [length for _, lengths in sides for length in lengths]
    causal = Segments.of_themselves(cumulative(prefixes + responses), q_NHC.device)
    cross = Segments.across(
        cumulative([sum(lengths) for _, lengths in sides]), cumulative(prefixes), q_NHC.device
    )
    return SharedPrefixAttention.apply(q_NHC, k_NGC, v_NGC, sum(prefixes), causal, cross, scale)


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
