"""every kind of parallelism over the GPUs that there are, against one process"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks._check import Check, at_most, gpu_count, skipped
from gpu_checks._steps import gradient_error, loss_error, save_models, step

TP, PP, CP = {"parallel.tensor": 2}, {"parallel.pipeline": 2}, {"parallel.context": 2}
SP = TP | {"parallel.sequence": True}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "DP 2": (2, "dense", {}),
    "TP 2": (2, "dense", TP),
    "TP 2 + SP": (2, "dense", SP),
    "PP 2": (2, "dense", PP),
    "CP 2": (2, "dense", CP),
    "EP 2": (2, "moe", {"parallel.expert": 2}),
    "CP 2, EP 2": (2, "moe", CP | {"parallel.expert": 2}),
    "TP 2 + SP, PP 2": (4, "dense", SP | PP),
    "TP 2 + SP, PP 2, virtual PP 2": (4, "dense", SP | PP | {"parallel.virtual_pipeline": 2}),
    "TP 2 + SP, CP 2": (4, "dense", SP | CP),
    "TP 2 + SP, EP 2, DP 2": (4, "moe", SP | {"parallel.expert": 2}),
    "TP 2 + SP, PP 2, DP 2": (8, "dense", SP | PP),
}
"""Name: (processes, policy, settings)"""


def run(out: Path) -> Iterator[Check]:
    """Yields differences of loss and gradients in fp32; without a GPU over two processes."""
    save_models(out)
    processes = gpu_count() or 2
    one = {model: step(out, f"one_{model}", 1, {}, model) for model in ("dense", "moe")}
    for name, (needed, model, settings) in LAYOUTS.items():
        if needed > processes:
            yield skipped(name, f"needs {needed} GPUs, there are {gpu_count()}")
            continue
        found = step(out, "layout", needed, settings, model)
        yield at_most(f"{name}: loss", loss_error(found, one[model]), 1e-4)
        yield at_most(f"{name}: gradients", gradient_error(found, one[model]), 1e-3)
