"""A check's outcome, and what several parts use. Imports no torch: the parts decide when it is loaded."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).parents[2]


class Skip(Exception):
    """A part that this machine cannot run; the message is the reason."""


@dataclass
class Check:
    """The outcome of one check."""

    name: str
    result: Literal["passed", "failed", "skipped", "noted"]
    """noted: a figure without a bound"""
    figure: float | str | None = None
    unit: str = ""
    bound: str = ""
    """Such as "at most 1e-05"; empty without one"""
    reason: str = ""
    """Why it was skipped or failed without a figure"""
    part: str = ""
    """Filled in by gpu_check.py"""

    def line(self) -> str:
        """Returns the check's row of the table."""
        figure = f"{self.figure:.4g}" if isinstance(self.figure, float) else str(self.figure or "")
        shown = f"{figure} {self.unit}".strip()
        return f"    {self.name:44} {self.result:8} {shown:24} {self.bound or self.reason}".rstrip()


def at_most(name: str, value: float, bound: float, unit: str = "") -> Check:
    """Returns a check that fails above the bound, and for NaN."""
    return Check(name, "passed" if value <= bound else "failed", float(value), unit, f"at most {bound:g}")


def at_least(name: str, value: float, bound: float, unit: str = "") -> Check:
    """Returns a check that fails below the bound, and for NaN."""
    return Check(name, "passed" if value >= bound else "failed", float(value), unit, f"at least {bound:g}")


def holds(name: str, condition: bool, figure: str, bound: str) -> Check:
    """Returns a check of a condition; figure and bound describe it."""
    return Check(name, "passed" if condition else "failed", figure, bound=bound)


def noted(name: str, value: float | str, unit: str = "") -> Check:
    """Returns a figure without a bound."""
    return Check(name, "noted", value, unit)


def skipped(name: str, reason: str) -> Check:
    """Returns a check that this machine cannot run."""
    return Check(name, "skipped", reason=reason)


def gpu_count() -> int:
    """Returns the number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def need_gpus(count: int) -> None:
    """Raises Skip if there are fewer GPUs."""
    if (found := gpu_count()) < count:
        raise Skip(f"needs {count} NVIDIA GPU{'s' if count > 1 else ''}; torch sees {found}")


def run_command(command: list[Any], **variables: str) -> str:
    """Runs a program in the repository's root and returns its output. Raises RuntimeError if it fails."""
    done = subprocess.run(
        [*map(str, command)], cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True
    )
    print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:6]))} ... ended with status {done.returncode}")
    return done.stdout


def torchrun(processes: int, *command: Any, **variables: str) -> str:
    """Runs a script or `-m module` in that many processes, as `run_command` does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return run_command([*launcher, *command], **{"OMP_NUM_THREADS": "1"} | variables)
