"""a checkpoint, and the step after it; a NaN gradient is refused"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from gpu_checks._check import Check, at_most, gpu_count, holds
from gpu_checks._steps import save_models, step


def run(out: Path) -> Iterator[Check]:
    """Yields the difference that a resume makes in bf16, on one process and, unless there is one GPU, two."""
    save_models(out)
    on_gpu = gpu_count() > 0
    for processes in (1, 2) if gpu_count() != 1 else (1,):
        settings = {"model.dtype": "bfloat16", "checkpoint.every": 1, "optimizer.lr": 1e-3}
        with TemporaryDirectory(dir=out) as directory:
            save_models(Path(directory))
            facts = step(Path(directory), "run", processes, settings).facts
        name = f"{processes} process{'es' if processes > 1 else ''}"
        # kernels of a GPU add in any order: the same step twice differs there, too
        yield at_most(f"{name}: weights after a resume", facts["resume_difference"], 1e-2 if on_gpu else 0.0)
        refused = "refused, weights kept" if facts["nan_refused"] else "taken"
        yield holds(f"{name}: NaN gradient", facts["nan_refused"], refused, "refused")
