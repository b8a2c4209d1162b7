"""Tests shared-prefix attention against one causal row per response, values and gradients."""

from functools import partial
from types import ModuleType

import pytest
import torch
from support import attention_reference as reference
from support.attention_reference import cumulative, differentiate

from megatron_bicc.model import attention as shared_prefix_attention
from megatron_bicc.model import attention_cpu, attention_cuda, attention_math
from megatron_bicc.model import segments as segments_module
from megatron_bicc.model.attention import SharedPrefixAttention
from megatron_bicc.model.segments import Segments

SIDES = [(21, [4, 7, 3]), (15, [6]), (0, [5, 2]), (9, [1, 1, 12])]
"""(prefix rows, rows of each response); a prompt of one token leaves no prefix rows"""
SCALE = 0.3
shared, row_by_row = (
    partial(attention, sides=SIDES, scale=SCALE) for attention in (reference.shared, reference.row_by_row)
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernels", "longest"),
    [(attention_cpu, 0), (attention_cpu, 8), (attention_cpu, 256), (attention_math, 0)],
)
def test_equals_one_row_a_response(
    dtype: torch.dtype,
    tolerance: float,
    groups: int,
    kernels: ModuleType,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what a GPU uses for these types; plain products run anywhere
    monkeypatch.setattr(shared_prefix_attention, "_kernels", lambda q: kernels)
    monkeypatch.setattr(segments_module, "LONGEST", longest)
    rows = sum(p + sum(side) for p, side in SIDES)
    random = torch.Generator().manual_seed(groups)
    inputs = [torch.randn(rows, h, 16, generator=random, dtype=torch.float64) for h in (4, groups, groups)]
    grad = torch.randn(rows, 4, 16, generator=random, dtype=torch.float64)
    found = differentiate(shared, [x.to(dtype) for x in inputs], grad.to(dtype))
    for ours, truth in zip(found, differentiate(row_by_row, inputs, grad), strict=True):
        assert (ours.double() - truth).norm() / truth.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_one_row_a_response(dtype: torch.dtype) -> None:
    rows = sum(p + sum(side) for p, side in SIDES)
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, h, 16, generator=random).to(dtype) for h in (4, 2, 2)]
    grad = torch.randn(rows, 4, 16, generator=random).to(dtype)
    truth = differentiate(row_by_row, [x.double() for x in inputs], grad.double())
    ours, theirs = (differentiate(f, inputs, grad) for f in (shared, row_by_row))
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert (a.double() - exact).norm() <= (b.double() - exact).norm()


def test_cuda_kernels_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shapes and types alone, on meta tensors: no GPU is needed, and no value is computed."""
    monkeypatch.setattr(shared_prefix_attention, "_kernels", lambda q: attention_cuda)
    meta = torch.device("meta")
    causal = Segments.of_themselves(cumulative([21, 15, 4, 7, 6]), meta)
    cross = Segments.across(cumulative([11, 6]), cumulative([21, 15]), meta)
    leaves = [
        torch.empty(53, h, 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for h in (4, 2, 2)
    ]
    out = SharedPrefixAttention.apply(*leaves, 36, causal, cross, 0.3)
    out.backward(torch.empty_like(out))
    assert [(x.shape, x.dtype) for x in (out, *(x.grad for x in leaves))] == [
        (x.shape, torch.bfloat16) for x in (leaves[0], *leaves)
    ]
