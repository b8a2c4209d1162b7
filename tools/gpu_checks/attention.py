"""shared-prefix attention against one row per response in fp64: output, dq, dk, dv

The bound is the error of torch's own attention, one row per response in the same type, times ALLOWANCE.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_checks._check import Check, at_most, noted
from support.attention_reference import Sides, differentiate, row_by_row, shared

from megatron_bicc import device

ALLOWANCE = 1.5
"""The product merges two roundings to the type where one row per response has one"""
FP32_BOUND = 1e-5
SHORT: Sides = [(21, [4, 7, 3]), (15, [6]), (0, [5, 2]), (9, [1, 1, 12]), (1, [1])]
"""Prefixes and responses of one token, and a prompt of one token, which leaves no prefix rows"""
LONG: Sides = [(1700, [8000, 300, 2100]), (40, [900, 1, 700]), (0, [512])]
NAMES = ("output", "dq", "dk", "dv")


def run(out: Path) -> Iterator[Check]:
    """Yields every relative error, on the GPU if there is one."""
    where = device.device()
    yield noted("kernels", device.choose_kernels("auto"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in (64, 128, 256):
            yield from _errors("short", SHORT, channels, dtype, where)
    if where.type == "cuda":
        yield from _errors("8,000 rows", LONG, 128, torch.bfloat16, where)
    yield from _noise(where)


def _errors(
    name: str, sides: Sides, channels: int, dtype: torch.dtype, where: torch.device
) -> Iterator[Check]:
    inputs, grad = _draw(sides, channels, dtype, where)

    def run_in(kind: torch.dtype, attention: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        chosen = partial(attention, sides=sides, scale=channels**-0.5)
        return differentiate(chosen, [x.to(kind) for x in inputs], grad.to(kind))

    ours, theirs, exact = run_in(dtype, shared), run_in(dtype, row_by_row), run_in(torch.float64, row_by_row)
    for quantity, a, b, truth in zip(NAMES, ours, theirs, exact, strict=True):
        bound = max(FP32_BOUND if dtype == torch.float32 else 0.0, ALLOWANCE * _relative(b, truth))
        kind = device.dtype_name(dtype)
        yield at_most(f"{name}, {kind}, {channels} channels: {quantity}", _relative(a, truth), bound)


def _noise(where: torch.device) -> Iterator[Check]:
    """Yields the difference of two equal runs: a GPU's dq is summed in any order."""
    inputs, grad = _draw(SHORT, 128, torch.bfloat16, where)
    attention = partial(shared, sides=SHORT, scale=128**-0.5)
    first, second = (differentiate(attention, inputs, grad) for _ in range(2))
    for quantity, a, b in zip(NAMES, first, second, strict=True):
        yield noted(f"two equal runs differ in {quantity}", _relative(a, b))


def _draw(
    sides: Sides, channels: int, dtype: torch.dtype, where: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns (q with 4 heads, k and v with 2), and the output's gradient."""
    rows = sum(prefix + sum(lengths) for prefix, lengths in sides)
    random = torch.Generator().manual_seed(channels)
    q, k, v, grad = (
        torch.randn(rows, heads, channels, generator=random).to(where, dtype) for heads in (4, 2, 2, 4)
    )
    return [q, k, v], grad


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())
