"""recompute none, selective and full; Transformer Engine's layers against the local ones"""

from collections.abc import Iterator
from pathlib import Path

from gpu_checks._check import Check, at_least, at_most, gpu_count, skipped
from gpu_checks._steps import Step, gradient_error, loss_error, save_models, smallest_cosine, step
from gpu_checks.environment import is_installed

LOCAL = {"WITHOUT_TRANSFORMER_ENGINE": "1"}


def run(out: Path) -> Iterator[Check]:
    """Yields differences from the local layers without recompute, of a dense policy and one with experts."""
    save_models(out)
    dtype = "bfloat16" if gpu_count() else "float32"
    for model in ("dense", "moe"):
        expected = step(out, "local", 1, {"model.dtype": dtype}, model, **LOCAL)
        for recompute in ("selective", "full"):
            settings = {"model.dtype": dtype, "model.recompute": recompute}
            found = step(out, recompute, 1, settings, model, **LOCAL)
            yield from _compared(f"{model}, recompute {recompute}", found, expected)
        if not (is_installed("transformer_engine") and gpu_count()):
            yield skipped(f"{model}, Transformer Engine", "needs a GPU and Transformer Engine: make te")
            continue
        for recompute in ("none", "selective", "full"):
            settings = {"model.dtype": dtype, "model.recompute": recompute}
            found = step(out, "te", 1, settings, model)
            yield from _compared(f"{model}, {found.facts['layers']}, recompute {recompute}", found, expected)


def _compared(name: str, found: Step, expected: Step) -> Iterator[Check]:
    if gpu_count():
        yield at_most(f"{name}: loss", loss_error(found, expected), 2e-2)
        yield at_least(f"{name}: smallest cosine", smallest_cosine(found, expected), 0.99)
    else:
        yield at_most(f"{name}: loss", loss_error(found, expected), 1e-6)
        yield at_most(f"{name}: gradients", gradient_error(found, expected), 1e-5)
