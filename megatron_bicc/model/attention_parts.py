"""Joins two attention calls of the same rows, each over its own keys: their outputs, and their gradients.

Where `device.kernels` has csrc's kernels (csrc/cuda/merge.h), each is one launch; plain torch elsewhere,
which is also the reference. Both work in place, on slices of larger tensors. Two parts joined are a part
again, so a third is joined by another call, and no part has to wait in memory for the last.

Shape suffixes as in `attention`.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_bicc import device


def merge(out_QHC: Tensor, lse_HQ: Tensor, other_QHC: Tensor, lse_other_HQ: Tensor) -> None:
    """Merges attention of the same rows to other keys into `out_QHC` and its log-sum-exp `lse_HQ`.

    The softmax over the union of both key sets, exactly: lse' = logaddexp(lse, lse_other) and
    out' = e^(lse - lse') out + e^(lse_other - lse') other, in at least float32. Where a row has no keys in a
    part, the part's log-sum-exp is -inf, and its output must be finite.

    out_QHC, other_QHC: of one type. lse_HQ, lse_other_HQ: float32, or float64 with float64 outputs.
    """
    if _for_kernels(out_QHC):
        return merge_attention(out_QHC, lse_HQ, other_QHC, lse_other_HQ)
    merged_HQ = torch.logaddexp(lse_HQ, lse_other_HQ)
    out_QHC.copy_(_share(lse_HQ, merged_HQ) * out_QHC + _share(lse_other_HQ, merged_HQ) * other_QHC)
    lse_HQ.copy_(merged_HQ)


def add_gradients(totals: tuple[Tensor, Tensor, Tensor], parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """Adds a call's gradients of q, k and v [rows, heads, C] to those of the same rows in another call.

    All six are of one type. Each sum is rounded once.
    """
    if _for_kernels(totals[0]):
        return add_attention_gradients(*totals, *parts)
    for total, part in zip(totals, parts, strict=True):
        total += part


def _share(part_HQ: Tensor, whole_HQ: Tensor) -> Tensor:
    """Returns the fraction of the softmax's mass that one part holds, [Q, H, 1]."""
    return torch.exp(part_HQ - whole_HQ).t().unsqueeze(-1)


def _for_kernels(x: Tensor) -> bool:
    return device.kernels() is not None and x.dtype != torch.float64


def _check(like: Tensor, pair: tuple[Tensor, Tensor]) -> None:
    """Raises ValueError unless both have one shape [rows, heads, C], `like`'s type and dense channels."""
    a, b = pair
    if not (a.shape == b.shape and a.dim() == 3 and a.dtype == b.dtype == like.dtype):
        raise ValueError(
            f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} must have one shape [rows, heads, C] "
            f"and the type {like.dtype}"
        )
    if a.stride(-1) != 1 or b.stride(-1) != 1:
        raise ValueError(f"strides {a.stride()} and {b.stride()}: the last must be 1")


@torch.library.custom_op("megatron_bicc::merge_attention", mutates_args=("out", "lse"))
def merge_attention(out: Tensor, lse: Tensor, other: Tensor, lse_other: Tensor) -> None:
    """Merges by csrc's kernel: see `merge`. Raises ValueError if a type, shape or stride does not fit."""
    _check(out, (out, other))
    if not lse.dtype == lse_other.dtype == torch.float32:
        raise ValueError(f"log-sum-exps are {lse.dtype} and {lse_other.dtype}; they must be float32")
    if out.shape[:2] != lse.t().shape or lse.shape != lse_other.shape:
        raise ValueError(
            f"out is {list(out.shape)} and the log-sum-exps {list(lse.shape)} and {list(lse_other.shape)}; "
            "they must be [heads, rows]"
        )
    csrc = device.kernels()
    rows, heads, dim = out.shape

    def part(out: Tensor, lse: Tensor) -> Any:
        return csrc.AttentionPart(
            out=out.data_ptr(), out_strides=out.stride()[:2], lse=lse.data_ptr(), lse_strides=lse.t().stride()
        )

    csrc.merge(
        device.dtype_name(out.dtype),
        rows=rows,
        heads=heads,
        dim=dim,
        part=part(out, lse),
        other=part(other, lse_other),
        stream=device.stream(out),
    )


@merge_attention.register_fake
def _(*arguments: Any) -> None: ...


@torch.library.custom_op("megatron_bicc::add_attention_gradients", mutates_args=("dq", "dk", "dv"))
def add_attention_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, part_q: Tensor, part_k: Tensor, part_v: Tensor
) -> None:
    """Adds by csrc's kernel: see `add_gradients`. Raises ValueError if types, shapes or strides don't fit."""
    csrc = device.kernels()
    pairs = ((dq, part_q), (dk, part_k), (dv, part_v))
    for pair in pairs:
        _check(dq, pair)
        if any(x.stride(1) != x.shape[2] for x in pair):
            raise ValueError(f"strides {[x.stride() for x in pair]}: the heads of a row must be contiguous")
    q, k, v = (
        csrc.RowSum(
            to=total.data_ptr(),
            to_stride=total.stride(0),
            from_=part.data_ptr(),
            from_stride=part.stride(0),
            rows=total.shape[0],
            width=total[0].numel() if total.shape[0] else 0,
        )
        for total, part in pairs
    )
    csrc.add_gradients(device.dtype_name(dq.dtype), q=q, k=k, v=v, stream=device.stream(dq))


@add_attention_gradients.register_fake
def _(*arguments: Any) -> None: ...
