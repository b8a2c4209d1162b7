"""Tests the double that runs csrc's CUDA kernels on the host."""

import math

import numpy as np
import torch


def test_a_kernel_runs_on_cpu_tensors(emulated_kernels):
    rows, heads, dim = 3, 2, 40
    generator = torch.Generator().manual_seed(0)
    out, other = torch.randn(2, rows, heads, dim, generator=generator)
    lse, lse_other = torch.randn(2, heads, rows, generator=generator)
    lse_other[0, 1] = -math.inf
    lse_merged = torch.logaddexp(lse, lse_other)
    shares = [torch.exp(part - lse_merged).t()[..., None] for part in (lse, lse_other)]
    expected = shares[0] * out + shares[1] * other
    emulated_kernels.merge(
        "float32",
        rows=rows,
        heads=heads,
        dim=dim,
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        lse_stride=rows,
        other=other.data_ptr(),
        lse_other=lse_other.data_ptr(),
        lse_other_stride=rows,
        stream=0,
    )
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, lse_merged, rtol=1e-6)
