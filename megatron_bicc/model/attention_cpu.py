"""Variable-length attention by torch's flash kernel for the CPU, one call per tile of segments.

Half precision is computed in fp32 and returned in fp32: the caller rounds the merge of two calls once.
Shape suffixes as in `attention`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_bicc.model.segments import Tile, VarlenCall

_aten = torch.ops.aten
DROPOUT = 0.0


def forward(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Returns (output [Q, H, C], log-sum-exp [H, Q])."""
    q, k, v = _at_least_fp32(call.q_QHC, call.k_KGC, call.v_KGC)
    # rows without keys are in no tile and keep these values
    out, lse_QH = torch.zeros_like(q), torch.full(q.shape[:2], float("-inf"), dtype=q.dtype)
    for tile in call.segments.tiles:
        tile_out, tile_lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            tile.q.take(q),
            tile.k.take(k),
            tile.k.take(v),
            DROPOUT,
            call.segments.causal and tile.mask is None,
            attn_mask=_mask(tile, q),
            scale=call.scale,
        )
        tile.q.put(out, tile_out)
        tile.q.put(lse_QH, tile_lse)
    return out, lse_QH.t()


def backward(
    call: VarlenCall, grad_QHC: Tensor, out_QHC: Tensor, lse_HQ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv), given the output and log-sum-exp of the whole softmax."""
    q, k, v, grad, out = _at_least_fp32(call.q_QHC, call.k_KGC, call.v_KGC, grad_QHC, out_QHC)
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
            call.segments.causal and tile.mask is None,
            attn_mask=_mask(tile, q),
            scale=call.scale,
        )
        tile.q.put(dq, tile_dq)
        put = tile.k.put if tile.mask is None else tile.k.add
        put(dk, tile_dk)
        put(dv, tile_dv)
    return dq, dk, dv


def _mask(tile: Tile, q: Tensor) -> Tensor | None:
    return None if tile.mask is None else tile.mask.to(q.dtype)


def _at_least_fp32(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
