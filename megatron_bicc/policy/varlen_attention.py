"""Variable-length attention by the kernels that stock torch ships: one interface, a CPU and a CUDA side.

Shape suffixes: Q query rows, K key rows, H query heads, G key-value heads, D head dimension.
The log-sum-exp is natural, [H, Q], float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from megatron_bicc.policy import varlen_math
from megatron_bicc.policy.packed import Segments

_aten = torch.ops.aten


def varlen_forward(
    q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention inside each segment: (output [Q, H, D], log-sum-exp [H, Q]).

    Rows of a segment without keys get an output of 0 and a log-sum-exp of -inf.
    """
    if _needs_math(q_QHD):
        return varlen_math.forward(q_QHD, k_KGD, v_KGD, _ranges(segments), causal, scale)
    forward = _forward_cuda if q_QHD.is_cuda else _forward_cpu
    return forward(q_QHD, k_KGD, v_KGD, segments, causal, scale)


def varlen_backward(
    grad_QHD: Tensor,
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) given the output and log-sum-exp of the whole softmax.

    These may come from a wider set of keys than this call's: the softmax weights that the kernel recomputes,
    exp(q k - lse), are then this call's share of the whole.
    """
    if _needs_math(q_QHD):
        return varlen_math.backward(
            grad_QHD, q_QHD, k_KGD, v_KGD, out_QHD, lse_HQ, _ranges(segments), causal, scale
        )
    backward = _backward_cuda if q_QHD.is_cuda else _backward_cpu
    return backward(grad_QHD, q_QHD, k_KGD, v_KGD, out_QHD, lse_HQ, segments, causal, scale)


def _needs_math(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float32, torch.float64)


def _batched(x_QHD: Tensor) -> Tensor:
    return x_QHD.transpose(0, 1).unsqueeze(0)


def _flat(x_1HQD: Tensor) -> Tensor:
    return x_1HQD[0].transpose(0, 1)


def _ranges(segments: Segments) -> list[tuple[slice, slice]]:
    """Query and key rows of every segment with both: the CPU kernel dies of a division by zero on others."""
    q, k = segments.bounds_q, segments.bounds_k
    pairs = [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]
    return [(rows, keys) for rows, keys in pairs if rows.stop > rows.start and keys.stop > keys.start]


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q)
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=lse_type)
    for rows, keys in _ranges(segments):
        segment_out, segment_lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            _batched(q[rows]), _batched(k[keys]), _batched(v[keys]), 0.0, causal, scale=scale
        )
        out[rows], lse[:, rows] = _flat(segment_out), segment_lse[0]
    return out, lse


def _backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _ranges(segments):
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _batched(grad[rows]),
            _batched(q[rows]),
            _batched(k[keys]),
            _batched(v[keys]),
            _batched(out[rows]),
            lse[:, rows].unsqueeze(0),
            0.0,
            causal,
            scale=scale,
        )
        dq[rows], dk[keys], dv[keys] = (_flat(x) for x in grads)
    return dq, dk, dv


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    s = segments
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, causal, False, scale=scale
    )
    if s.keyless_rows is not None:
        out[s.keyless_rows] = 0.0
        lse[:, s.keyless_rows] = float("-inf")
    return out, lse


def _backward_cuda(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    s = segments
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = _aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        s.cu_q,
        s.cu_k,
        s.max_q,
        s.max_k,
        0.0,
        causal,
        no_dropout,
        unused,
        scale=scale,
    )
    if s.keyless_rows is not None:
        dq[s.keyless_rows] = 0.0
    return dq, dk, dv
