"""Variable-length attention in plain matrix products: for fp32 and fp64 on CUDA, which flash kernels refuse.

Slow and exact: for small models and tests on a GPU. Shape suffixes as in varlen_call.
"""

import torch
from torch import Tensor

from megatron_bicc.model.segments import VarlenCall


def forward(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """(output [Q, H, D], log-sum-exp [H, Q])"""
    q_QHD, k_KGD, v_KGD = call.q_QHD, call.k_KGD, call.v_KGD
    out = torch.zeros_like(q_QHD)
    lse = q_QHD.new_full((q_QHD.shape[1], q_QHD.shape[0]), float("-inf"))
    for rows, keys in call.segments.ranges():
        scores = _scores(q_QHD[rows], k_KGD[keys], call)
        lse[:, rows] = scores.logsumexp(-1)
        p = (scores - lse[:, rows].unsqueeze(-1)).exp()
        out[rows] = torch.einsum("hqk,khd->qhd", p, _heads(v_KGD[keys], q_QHD))
    return out, lse


def backward(
    call: VarlenCall, grad_QHD: Tensor, out_QHD: Tensor, lse_HQ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) given the output and log-sum-exp of the whole softmax."""
    q_QHD, k_KGD, v_KGD = call.q_QHD, call.k_KGD, call.v_KGD
    dq, dk, dv = torch.zeros_like(q_QHD), torch.zeros_like(k_KGD), torch.zeros_like(v_KGD)
    for rows, keys in call.segments.ranges():
        q, grad = q_QHD[rows], grad_QHD[rows]
        k, v = _heads(k_KGD[keys], q), _heads(v_KGD[keys], q)
        p = (_scores(q, k_KGD[keys], call) - lse_HQ[:, rows].unsqueeze(-1)).exp()
        delta = (grad * out_QHD[rows]).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", grad, v) - delta) * call.scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k)
        dk[keys] = _groups(torch.einsum("hqk,qhd->khd", ds, q), k_KGD)
        dv[keys] = _groups(torch.einsum("hqk,qhd->khd", p, grad), v_KGD)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, call: VarlenCall) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, _heads(k, q)) * call.scale
    if call.segments.causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _heads(x_KGD: Tensor, q_QHD: Tensor) -> Tensor:
    """Keys or values repeated for every query head of their group, [K, H, D]."""
    return x_KGD.repeat_interleave(q_QHD.shape[1] // x_KGD.shape[1], dim=1)


def _groups(grad_KHD: Tensor, x_KGD: Tensor) -> Tensor:
    """The inverse's gradient: summed over the query heads of a group, [K, G, D]."""
    return grad_KHD.unflatten(1, (x_KGD.shape[1], -1)).sum(2)
