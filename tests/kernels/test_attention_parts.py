"""Tests the kernels that join two attention calls, against sums in float64 and against plain torch.

Shape suffixes: Q rows, K keys, H heads, C channels.
"""

import math

import pytest
import torch
from model.test_attention import SIDES, shared
from support.attention_reference import differentiate
from support.emulated_kernels import calls_of_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_bicc import device
from megatron_bicc.model.attention_parts import add_attention_gradients, add_gradients, merge, merge_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FIRST = 9
"""Rows before those that are merged"""


def sliced(
    rows: int, heads: int, dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns (out [Q, H, C], log-sum-exp [H, Q]), both slices of larger tensors."""
    out = torch.randn(rows + FIRST, heads, dim).to(kernel_device, dtype)
    return out[FIRST:], torch.randn(heads, rows + FIRST).to(kernel_device)[:, FIRST:]


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns the softmax over all parts' keys, in float64."""
    lse_HQ = torch.stack([lse.double() for _, lse in parts]).logsumexp(0)
    shares = [torch.exp(lse.double() - lse_HQ).t().unsqueeze(-1) for _, lse in parts]
    return sum(share * out.double() for share, (out, _) in zip(shares, parts, strict=True)), lse_HQ


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, heads, dim", [(1, 1, 4), (37, 3, 64), (5, 8, 128), (5, 2, 200), (3, 2, 256), (7, 2, 5)]
)
def test_merge_is_the_softmax_over_both_sets_of_keys(
    kernel_device: torch.device, dtype: torch.dtype, rows: int, heads: int, dim: int
) -> None:
    torch.manual_seed(0)
    out, lse = sliced(rows, heads, dim, dtype, kernel_device)
    # other strides: what the kernel for the CPU returns
    other, lse_other = (
        torch.randn(rows, heads, dim).to(kernel_device, dtype),
        torch.randn(rows, heads).to(kernel_device).t(),
    )
    lse[-1, -1] += 200.0
    expected, expected_lse = joined([(out, lse), (other, lse_other)])
    before = out._base[:FIRST].clone(), lse._base[:, :FIRST].clone()
    merge(out, lse, other, lse_other)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out._base[:FIRST], before[0])
    assert torch.equal(lse._base[:, :FIRST], before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_whose_addresses_are_not_those_of_a_vector(
    kernel_device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 3, 33).to(kernel_device, dtype)
    out, lse = wide[..., 1:], torch.randn(3, 6).to(kernel_device)
    other, lse_other = torch.randn(6, 3, 32).to(kernel_device, dtype), torch.randn(3, 6).to(kernel_device)
    expected, _ = joined([(out, lse), (other, lse_other)])
    first = wide[..., 0].clone()
    merge(out, lse, other, lse_other)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert torch.equal(wide[..., 0], first)


def test_a_part_without_keys_has_no_share(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    out, lse = sliced(3, 2, 64, torch.float32, kernel_device)
    other, lse_other = torch.randn(3, 2, 64).to(kernel_device), torch.randn(2, 3).to(kernel_device)
    lse[0, 0], lse_other[0, 1] = -math.inf, -math.inf
    lse[1, 2], lse_other[1, 2] = -math.inf, -math.inf
    own = out.clone()
    merge(out, lse, other, lse_other)
    torch.testing.assert_close(out[0, 0], other[0, 0])
    torch.testing.assert_close(out[1, 0], own[1, 0])
    assert lse[0, 0] == lse_other[0, 0]
    assert lse[1, 2] == -math.inf
    assert out[2, 1].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_parts_are_merged_by_two_calls(kernel_device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [sliced(11, 2, 64, dtype, kernel_device) for _ in range(3)]
    expected, expected_lse = joined(parts)
    out, lse = parts[0]
    for other in parts[1:]:
        merge(out, lse, *other)
    torch.testing.assert_close(out.double(), expected, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 6])
def test_gradients_are_added_and_rounded_once(
    kernel_device: torch.device, dtype: torch.dtype, dim: int
) -> None:
    torch.manual_seed(0)
    totals = [torch.randn(40, heads, dim).to(kernel_device, dtype) for heads in (4, 2, 2)]
    # rows that lie apart, as in a tensor with more heads
    shapes = ((31, 4), (9, 2), (9, 2))
    parts = tuple(torch.randn(rows, h + 1, dim).to(kernel_device, dtype)[:, :h] for rows, h in shapes)
    expected = [total.clone() for total in totals]
    slices = [slice(9, 40), slice(0, 9), slice(0, 9)]
    for total, part, rows in zip(expected, parts, slices, strict=True):
        total[rows] = (total[rows].float() + part.float()).to(dtype)
    add_gradients(tuple(total[rows] for total, rows in zip(totals, slices, strict=True)), parts)
    assert all(map(torch.equal, totals, expected))


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    out, lse = torch.zeros(3, 2, 8, device=kernel_device), torch.zeros(2, 3, device=kernel_device)
    with pytest.raises(ValueError, match="must have one shape"):
        merge_attention(out, lse, out[:2].clone(), lse.clone())
    with pytest.raises(ValueError, match="the type torch.float32"):
        merge_attention(out, lse, out.bfloat16(), lse.clone())
    with pytest.raises(ValueError, match="must be float32"):
        merge_attention(out, lse, out.clone(), lse.double())
    with pytest.raises(ValueError, match=r"they must be \[heads, rows\]"):
        merge_attention(out, lse, out.clone(), lse.t().contiguous())
    with pytest.raises(ValueError, match="the last must be 1"):
        merge_attention(out, lse, torch.zeros(3, 8, 2, device=kernel_device).transpose(1, 2), lse.clone())
    apart = torch.zeros(3, 2, 9, device=kernel_device)[..., :8]
    with pytest.raises(ValueError, match="heads of a row must be contiguous"):
        add_attention_gradients(out, out.clone(), out.clone(), apart, out.clone(), out.clone())
    with pytest.raises(ValueError, match="must have one shape"):
        add_attention_gradients(out, out.clone(), out.clone(), out[:1].clone(), out.clone(), out.clone())


def test_operators_are_what_torch_expects(kernel_device: torch.device) -> None:
    out, lse = sliced(3, 2, 8, torch.float32, kernel_device)
    torch.library.opcheck(merge_attention, (out, lse, torch.randn_like(out), torch.randn_like(lse)))
    six = [torch.randn(4, 2, 8, device=kernel_device) for _ in range(6)]
    torch.library.opcheck(add_attention_gradients, tuple(six))


def inputs(kernel_device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Returns ([q, k, v], gradient of the output) for `SIDES`."""
    rows = sum(prefix + sum(side) for prefix, side in SIDES)
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, heads, 16, generator=random).to(kernel_device) for heads in (4, 2, 2, 4)]
    return made[:3], made[3]


def test_attention_with_kernels_equals_plain_torch(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, grad = inputs(kernel_device)
    called = calls_of_kernels(monkeypatch)
    found = differentiate(shared, qkv, grad)
    assert {"merge", "add_gradients"} <= set(called)
    monkeypatch.setattr(device, "_kernels", None)
    for ours, theirs in zip(found, differentiate(shared, qkv, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_recomputed_attention_has_the_same_gradients(kernel_device: torch.device) -> None:
    qkv, grad = inputs(kernel_device)

    def recomputed(*qkv: Tensor) -> Tensor:
        return checkpoint(shared, *qkv, use_reentrant=False)

    for again, once in zip(
        differentiate(recomputed, qkv, grad), differentiate(shared, qkv, grad), strict=True
    ):
        assert torch.equal(again, once)


def test_compiled_code_calls_the_kernels(kernel_device: torch.device) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(out: Tensor, lse: Tensor, other: Tensor, lse_other: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = out * 2.0, lse.clone()
        merge(out[1:], lse[:, 1:], other, lse_other)
        add_gradients((out[:2], out[2:], out[4:]), (other[:2], other[:4], other[:2]))
        return out, lse

    tensors = [
        x.to(kernel_device)
        for x in (torch.randn(6, 2, 8), torch.randn(2, 6), torch.randn(5, 2, 8), torch.randn(2, 5))
    ]
    for found, expected in zip(compiled(*tensors), compiled.__wrapped__(*tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
