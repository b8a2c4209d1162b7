"""Variable-length attention by torch's flash kernels for CUDA: fp16 and bf16, on Ampere or newer.

Shape suffixes as in `attention`.
"""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from megatron_bicc.errors import UserError, first_line
from megatron_bicc.model.segments import Segments, VarlenCall

_aten = torch.ops.aten
DROPOUT = 0.0


@dataclass(frozen=True)
class Package:
    """Kernels that replace torch's own behind the same operators."""

    name: str
    """Distribution to install"""
    module: str
    """Module that torch imports the kernels from"""
    registered: str
    """Name in torch's register of implementations"""
    capabilities: tuple[int, ...]
    """Major compute capabilities of the GPUs that it supports"""


PACKAGES = {
    "fa4": Package("flash-attn-4", "flash_attn.cute.interface", "FA4", (9, 10)),
    "fa3": Package("flash-attn-3", "flash_attn_interface", "FA3", (9,)),
}
"""By the value of model.attention, the newest first"""
LARGEST_HEAD = 128
"""Channels of a head up to which `auto` chooses a package: both support these in forward and backward"""


def choose_kernels(choice: Literal["auto", "fa2", "fa3", "fa4"], head_dim: int) -> str:
    """Selects the flash attention kernels of this process; returns their name, for the log.

    auto takes the newest package that is installed, can be imported and supports this GPU and `head_dim`.
    Raises UserError if the named package is not installed, cannot be imported or does not support this GPU.
    """
    named = {} if choice in ("auto", "fa2") else {choice: PACKAGES[choice]}
    fitting = PACKAGES if choice == "auto" and head_dim <= LARGEST_HEAD else named
    for package in fitting.values():
        why = _refusal(package)
        if not why:
            activate_flash_attention_impl(package.registered)
            return package.name
        if named:
            raise UserError(
                f"model.attention is {choice}; the package {package.name} {why}; set model.attention=auto"
            )
    return "flash attention 2 of torch"


def _refusal(package: Package) -> str:
    """Returns why this process cannot use the package, as the end of a sentence; empty if it can."""
    if find_spec(package.module.partition(".")[0]) is None:
        return "is not installed: install it"
    try:
        importlib.import_module(package.module)
    except Exception as error:  # a package for another torch or CUDA raises any type
        return f"cannot be imported: {first_line(error)}"
    major, minor = torch.cuda.get_device_capability()
    return "" if major in package.capabilities else f"does not support compute capability {major}.{minor}"


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
        **_window(s),
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
        **_window(s),
    )
    if s.keyless_rows is not None:  # as in forward
        dq[s.keyless_rows] = 0.0
    return dq, dk, dv


def _window(segments: Segments) -> dict[str, int]:
    """Returns the kernels' arguments for a window: they count the keys before a row's own, and after it."""
    if segments.window is None:
        return {}
    return {"window_size_left": segments.window - 1, "window_size_right": 0}
