"""Variable-length attention by the kernels that stock torch ships: one interface, a CPU and a CUDA side.

Shape suffixes: Q query rows, K key rows, H query heads, G key-value heads, D head dimension.
The log-sum-exp is natural, [H, Q], float32 (float64 for float64 inputs).
"""

from types import ModuleType

import torch
from torch import Tensor

from megatron_bicc.policy import varlen_cpu, varlen_cuda, varlen_math
from megatron_bicc.policy.varlen_call import VarlenCall


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
        return varlen_cpu
    return varlen_math if q.dtype in (torch.float32, torch.float64) else varlen_cuda
