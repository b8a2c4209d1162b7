"""Variable-length attention by torch's flash kernels for CUDA: fp16 and bf16, on Ampere or newer.

Shape suffixes as in `attention`.
"""

import torch
from torch import Tensor

from megatron_bicc.model.segments import VarlenCall

_aten = torch.ops.aten
DROPOUT = 0.0


def forward(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Returns (output [Q, H, C], log-sum-exp [H, Q])."""
    s = call.segments
    out, lse, *_ = _aten._flash_attention_forward(
        call.q_QHC,
        call.k_KGC,
        call.v_KGC,
        s.cu_q,
        s.cu_k,
        s.max_q,
        s.max_k,
        DROPOUT,
        s.causal,
        False,
        scale=call.scale,
    )
    if s.keyless_rows is not None:  # the kernel does not write them
        out[s.keyless_rows] = 0.0
        lse[:, s.keyless_rows] = float("-inf")
    return out, lse


def backward(
    call: VarlenCall, grad_QHC: Tensor, out_QHC: Tensor, lse_HQ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv), given the output and log-sum-exp of the whole softmax."""
    s = call.segments
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad_QHC.device)
    unused = torch.empty(0, device=grad_QHC.device)
    dq, dk, dv = _aten._flash_attention_backward(
        grad_QHC,
        call.q_QHC,
        call.k_KGC,
        call.v_KGC,
        out_QHC,
        lse_HQ,
        s.cu_q,
        s.cu_k,
        s.max_q,
        s.max_k,
        DROPOUT,
        s.causal,
        no_dropout,
        unused,
        scale=call.scale,
    )
    if s.keyless_rows is not None:  # as in forward
        dq[s.keyless_rows] = 0.0
    return dq, dk, dv
