"""Shared-prefix attention: responses attend to a prefix that is computed once for all of them.

Rows are prefix-major: the prefix rows of all sides, then the response rows. Two variable-length calls and a
merge:

    out, lse   = each segment (prefix or response) independently, causal
    outx, lsex = response rows against their own side's prefix, not causal
    response rows: lse' = logaddexp(lse, lsex), out' = e^(lse - lse') out + e^(lsex - lse') outx

This is the softmax over the union of both key sets, exactly. Backward calls the two kernels again, both with
the merged out' and lse': a flash kernel recomputes its softmax weights as exp(q k - lse), so with lse' these
are this call's part of the whole softmax, and with out' so is delta = sum(grad * out'). Autograd cannot do
the merge: torch's kernels drop the gradient through the log-sum-exp, which gives wrong dq and dk.

Each device's kernels are a module (attention_cpu, attention_cuda, attention_math) with two functions:

    forward(call) -> (output [Q, H, C], log-sum-exp [H, Q])
    backward(call, grad_QHC, out_QHC, lse_HQ) -> (dq, dk, dv), given out and lse of the whole softmax

Rows of a segment without keys get an output of 0 and a log-sum-exp of -inf. Outputs and gradients are in the
call's type or a wider one. The log-sum-exp is natural and float32 (float64 for float64 inputs).

Shape suffixes: N rows of the micro-batch, Q query rows, K key rows, H query heads, G key-value heads, C
channels.
"""

from types import ModuleType
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bicc.model import attention_cpu, attention_cuda, attention_math
from megatron_bicc.model.attention_parts import add_gradients, merge
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.segments import Segments, VarlenCall


def _kernels(q: Tensor) -> ModuleType:
    """Returns the module of kernels for the device and type of `q`."""
    if not q.is_cuda:
        return attention_cpu
    return attention_math if q.dtype in (torch.float32, torch.float64) else attention_cuda


class SharedPrefixAttention(torch.autograd.Function):
    """(q [N, H, C], k [N, G, C], v [N, G, C], first response row, causal, cross, scale) -> [N, H, C].

    causal: all segments over the N rows. cross: response rows, from the first, against prefix rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: int,
        causal: Segments,
        cross: Segments,
        scale: float,
    ) -> Tensor:
        kernels = _kernels(q)
        out, lse = kernels.forward(VarlenCall(q, k, v, causal, scale))
        rows = slice(first, first + cross.bounds_q[-1])
        if first > 0 and rows.stop > first:  # kernels do not take calls without rows or keys
            # the keys before the first response row are those of the prefixes
            out_cross, lse_cross = kernels.forward(VarlenCall(q[rows], k[:first], v[:first], cross, scale))
            # where a side has no prefix, lse_cross is -inf; a response row attends at least to itself
            merge(out[rows], lse[:, rows], out_cross, lse_cross)
        # Kernels that compute in a wider type are rounded once, after the merge.
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rows, ctx.causal, ctx.cross, ctx.scale = rows, causal, cross, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        rows, first, grad = ctx.rows, ctx.rows.start, grad.contiguous()
        kernels = _kernels(q)
        # both calls get the merged out and lse, so each returns its part of the exact gradient
        dq, dk, dv = kernels.backward(VarlenCall(q, k, v, ctx.causal, ctx.scale), grad, out, lse)
        if first > 0 and rows.stop > first:
            call = VarlenCall(q[rows], k[:first], v[:first], ctx.cross, ctx.scale)
            # a slice of lse [H, N] along N is strided; the CUDA kernel reads contiguous memory
            cross = kernels.backward(call, grad[rows], out[rows], lse[:, rows].contiguous())
            add_gradients((dq[rows], dk[:first], dv[:first]), cross)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class SharedPrefixCoreAttention(torch.nn.Module):
    """The `core_attention` of megatron-core's layer spec; packed_seq_params holds the boundaries."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.scale = config.softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedBatch | None = None,
    ) -> Tensor:
        """Query [N, 1, H, C], key and value [N, 1, G, C] -> [N, 1, H * C]."""
        packed = packed_seq_params
        first = packed.response_rows.start
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        out = SharedPrefixAttention.apply(q, k, v, first, packed.causal, packed.cross, self.scale)
        return out.reshape(out.shape[0], 1, -1)
