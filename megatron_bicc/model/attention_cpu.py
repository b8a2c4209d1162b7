"""Variable-length attention by torch's flash kernel for the CPU, a tile of segments at a time.

Half precision is computed in fp32, and results are left so: the caller rounds the sum of its parts once.
Shape suffixes as in varlen_call.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_bicc.model.segments import VarlenCall

_aten = torch.ops.aten
DROPOUT = 0.0


def forward(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """(output [Q, H, D], log-sum-exp [H, Q])"""
    q, k, v = _at_least_fp32(call.q_QHD, call.k_KGD, call.v_KGD)
    out, lse_QH = torch.zeros_like(q), torch.full(q.shape[:2], float("-inf"), dtype=q.dtype)
    for tile in call.segments.tiles:
        tile_out, tile_lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            tile.q.take(q), tile.k.take(k), tile.k.take(v), DROPOUT, call.segments.causal, scale=call.scale
        )
        tile.q.put(out, tile_out)
        tile.q.put(lse_QH, tile_lse)
    return out, lse_QH.t()


def backward(
    call: VarlenCall, grad_QHD: Tensor, out_QHD: Tensor, lse_HQ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) given the output and log-sum-exp of the whole softmax."""
    q, k, v, grad, out = _at_least_fp32(call.q_QHD, call.k_KGD, call.v_KGD, grad_QHD, out_QHD)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in call.segments.tiles:
        tile_dq, tile_dk, tile_dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            tile.q.take_gradient(grad),
            tile.q.take(q),
            tile.k.take(k),
            tile.k.take(v),
            tile.q.take(out),
            tile.q.take(lse_HQ.t()),
            DROPOUT,
            call.segments.causal,
            scale=call.scale,
        )
        tile.q.put(dq, tile_dq)
        tile.k.put(dk, tile_dk)
        tile.k.put(dv, tile_dv)
    return dq, dk, dv


def _at_least_fp32(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
