"""Variable-length attention by the kernels that stock torch ships: one interface, a CPU and a CUDA side.

Shape suffixes: Q query rows, K key rows, H query heads, G key-value heads, D head dimension.
The log-sum-exp is natural, [H, Q], float32 (float64 for float64 inputs).

Attention of responses to a prefix that they share, computed once: two variable-length calls and a merge.

Rows are prefix-major: P prefix rows of all sides, then the response rows.

    out, lse   = every segment by itself, causal                   (prefixes and responses)
    outx, lsex = response rows against their own side's prefix     (not causal)
    response rows: lse' = logaddexp(lse, lsex), out' = e^(lse - lse') out + e^(lsex - lse') outx

Backward calls the two kernels again, both fed the merged out' and lse': torch's kernels drop the gradient
through the log-sum-exp, so a merge left to autograd gives wrong dq and dk.
"""

from types import ModuleType
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_bicc.model import attention_cpu, attention_cuda, attention_math
from megatron_bicc.model.batch import PackedBatch
from megatron_bicc.model.segments import Segments, VarlenCall


def varlen_forward(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Attention inside each segment: (output [Q, H, D], log-sum-exp [H, Q]).

    Rows of a segment without keys get an output of 0 and a log-sum-exp of -inf. The output, as the gradients
    of `varlen_backward`, is in the call's type or in a wider one.
    """
    return _kernels(call.q_QHD).forward(call)


def varlen_backward(
    call: VarlenCall, grad_QHD: Tensor, out_QHD: Tensor, lse_HQ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) given the output and log-sum-exp of the whole softmax.

    These may come from a wider set of keys than this call's: the softmax weights that the kernel recomputes,
    exp(q k - lse), are then this call's share of the whole.
    """
    return _kernels(call.q_QHD).backward(call, grad_QHD, out_QHD, lse_HQ)


def _kernels(q: Tensor) -> ModuleType:
    if not q.is_cuda:
        return attention_cpu
    return attention_math if q.dtype in (torch.float32, torch.float64) else attention_cuda


class SharedPrefixAttention(torch.autograd.Function):
    """(q [T, H, D], k [T, G, D], v [T, G, D], first response row, causal, cross, scale) -> [T, H, D]."""

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
        out, lse = varlen_forward(VarlenCall(q, k, v, causal, scale))
        rows = slice(first, first + cross.bounds_q[-1])
        if rows.start > 0 and rows.stop > rows.start:
            out_cross, lse_cross = varlen_forward(VarlenCall(q[rows], k[:first], v[:first], cross, scale))
            merged = torch.logaddexp(lse[:, rows], lse_cross)
            out[rows] = _share(lse[:, rows], merged) * out[rows] + _share(lse_cross, merged) * out_cross
            lse[:, rows] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rows, ctx.causal, ctx.cross, ctx.scale = rows, causal, cross, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        rows, first, grad = ctx.rows, ctx.rows.start, grad.contiguous()
        dq, dk, dv = varlen_backward(VarlenCall(q, k, v, ctx.causal, ctx.scale), grad, out, lse)
        if rows.start > 0 and rows.stop > rows.start:
            call = VarlenCall(q[rows], k[:first], v[:first], ctx.cross, ctx.scale)
            dq_cross, dk_cross, dv_cross = varlen_backward(
                call, grad[rows], out[rows], lse[:, rows].contiguous()
            )
            dq[rows] += dq_cross
            dk[:first] += dk_cross
            dv[:first] += dv_cross
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _share(part_HN: Tensor, whole_HN: Tensor) -> Tensor:
    """Share of the softmax mass that one part holds, [N, H, 1]."""
    return torch.exp(part_HN - whole_HN).t().unsqueeze(-1)


class SharedPrefixCoreAttention(torch.nn.Module):
    """The `core_attention` of megatron-core's layer spec; reads its layout from packed_seq_params."""

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
        """Query [T, 1, H, D], key and value [T, 1, G, D] -> [T, 1, H * D]."""
        packed = packed_seq_params
        first = packed.response_rows.start
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        out = SharedPrefixAttention.apply(q, k, v, first, packed.causal, packed.cross, self.scale)
        return out.reshape(out.shape[0], 1, -1)
