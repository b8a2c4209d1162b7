"""Variable-length attention by plain matrix products: for fp32 and fp64 on CUDA, which flash kernels refuse.

Slow and exact: for small models, and tests on a GPU. Shape suffixes as in `attention`.
"""

import torch
from torch import Tensor

from megatron_bicc.model.segments import VarlenCall, window_mask


def forward(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Returns (output [Q, H, C], log-sum-exp [H, Q])."""
    q_QHC, k_KGC, v_KGC = call.q_QHC, call.k_KGC, call.v_KGC
    out = torch.zeros_like(q_QHC)
    lse = q_QHC.new_full((q_QHC.shape[1], q_QHC.shape[0]), float("-inf"))
    for rows, keys in call.segments.ranges():
        scores = _scores(q_QHC[rows], k_KGC[keys], call)
        lse[:, rows] = scores.logsumexp(-1)
        p = (scores - lse[:, rows].unsqueeze(-1)).exp()
        out[rows] = torch.einsum("hqk,khc->qhc", p, _heads(v_KGC[keys], q_QHC))
    return out, lse


def backward(
    call: VarlenCall, grad_QHC: Tensor, out_QHC: Tensor, lse_HQ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv), given the output and log-sum-exp of the whole softmax."""
    q_QHC, k_KGC, v_KGC = call.q_QHC, call.k_KGC, call.v_KGC
    dq, dk, dv = torch.zeros_like(q_QHC), torch.zeros_like(k_KGC), torch.zeros_like(v_KGC)
    for rows, keys in call.segments.ranges():
        q, grad = q_QHC[rows], grad_QHC[rows]
        k, v = _heads(k_KGC[keys], q), _heads(v_KGC[keys], q)
        p = (_scores(q, k_KGC[keys], call) - lse_HQ[:, rows].unsqueeze(-1)).exp()
        # the softmax's derivative needs sum over keys of p dp, which is grad . out
        delta = (grad * out_QHC[rows]).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("qhc,khc->hqk", grad, v) - delta) * call.scale
        dq[rows] = torch.einsum("hqk,khc->qhc", ds, k)
        dk[keys] = _summed(torch.einsum("hqk,qhc->khc", ds, q), k_KGC)
        dv[keys] = _summed(torch.einsum("hqk,qhc->khc", p, grad), v_KGC)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, call: VarlenCall) -> Tensor:
    scores = torch.einsum("qhc,khc->hqk", q, _heads(k, q)) * call.scale
    if call.segments.window is not None:
        scores = scores + window_mask(*scores.shape[1:], call.segments.window, q.device)
    elif call.segments.causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _heads(x_KGC: Tensor, q_QHC: Tensor) -> Tensor:
    """Returns keys or values repeated for every query head that shares them, [K, H, C]."""
    return x_KGC.repeat_interleave(q_QHC.shape[1] // x_KGC.shape[1], dim=1)


def _summed(grad_KHC: Tensor, x_KGC: Tensor) -> Tensor:
    """Returns the gradient of `_heads`: sums over the query heads that share a key-value head, [K, G, C]."""
    return grad_KHC.unflatten(1, (x_KGC.shape[1], -1)).sum(2)
