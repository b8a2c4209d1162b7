"""Tests the attention kernels of csrc/cuda against PyTorch. Skipped without a GPU or the build.

Shape suffixes: T rows, H heads, D head dimension.
"""

import math

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
_C_cuda = pytest.importorskip("megatron_bicc._C_cuda", reason="built without nvcc")
DEVICE = torch.device("cuda")


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, heads, dim", [(1, 1, 4), (37, 3, 64), (130, 8, 128), (5, 2, 200)])
def test_merge_of_two_attention_parts(dtype, rows, heads, dim):
    torch.manual_seed(0)
    own_THD, other_THD = (torch.randn(rows, heads, dim, device=DEVICE).to(dtype) for _ in range(2))
    # A row offset and different strides, as the response rows of a micro-batch have them.
    lse_HT, lse_other_HT = (
        torch.randn(heads, rows + 9, device=DEVICE),
        torch.randn(heads, rows, device=DEVICE),
    )
    lse_other_HT[0, 0] = -math.inf
    own_lse_HT = lse_HT[:, 9:].clone()
    merged_HT = torch.logaddexp(own_lse_HT, lse_other_HT)
    shares = [torch.exp(part - merged_HT).t()[..., None] for part in (own_lse_HT, lse_other_HT)]
    expected_THD = shares[0] * own_THD.float() + shares[1] * other_THD.float()
    _C_cuda.merge(
        str(dtype).removeprefix("torch."),
        rows=rows,
        heads=heads,
        dim=dim,
        out=own_THD.data_ptr(),
        lse=lse_HT[:, 9:].data_ptr(),
        lse_stride=rows + 9,
        other=other_THD.data_ptr(),
        lse_other=lse_other_HT.data_ptr(),
        lse_other_stride=rows,
        stream=stream(),
    )
    torch.testing.assert_close(lse_HT[:, 9:], merged_HT, rtol=1e-6, atol=1e-6)
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(own_THD.float(), expected_THD, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pre_backward_reduction(dtype):
    torch.manual_seed(0)
    out_THD, grad_THD = (torch.randn(77, 6, 128, device=DEVICE).to(dtype) for _ in range(2))
    delta_HT = torch.empty(6, 77, device=DEVICE)
    _C_cuda.pre_backward(
        str(dtype).removeprefix("torch."),
        rows=77,
        heads=6,
        dim=128,
        out=out_THD.data_ptr(),
        grad=grad_THD.data_ptr(),
        delta=delta_HT.data_ptr(),
        stream=stream(),
    )
    expected_HT = (out_THD.float() * grad_THD.float()).sum(-1).t()
    torch.testing.assert_close(delta_HT, expected_HT, rtol=1e-5, atol=1e-4)
