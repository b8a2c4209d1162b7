"""a BICC step on the GPU, in fp32 and bf16, against the same step on the CPU"""

from collections.abc import Iterator
from pathlib import Path

from gpu_checks._check import Check, at_least, at_most, need_gpus
from gpu_checks._steps import ON_CPU, gradient_error, loss_error, save_models, smallest_cosine, step


def run(out: Path) -> Iterator[Check]:
    """Yields the differences of loss, norm and gradients."""
    need_gpus(1)
    save_models(out)
    for kernels in ("torch", "auto"):
        for dtype in ("float32", "bfloat16"):
            settings = {"model.dtype": dtype, "model.kernels": kernels}
            expected = step(out, "cpu", 1, settings, **ON_CPU)
            found = step(out, "gpu", 1, settings)
            is_fp32, name = dtype == "float32", f"{dtype}, model.kernels={kernels}"
            yield at_most(f"{name}: loss", loss_error(found, expected), 1e-4 if is_fp32 else 2e-2)
            norm = abs(found.grad_norm / expected.grad_norm - 1)
            yield at_most(f"{name}: gradient norm", norm, 1e-4 if is_fp32 else 2e-2)
            if is_fp32:
                yield at_most(f"{name}: gradients", gradient_error(found, expected), 1e-3)
            else:
                yield at_least(f"{name}: smallest cosine", smallest_cosine(found, expected), 0.99)
