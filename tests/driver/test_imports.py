"""Tests which modules a run imports before its first step."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def loaded(module: str, *names: str) -> set[str]:
    """Those of the names that are loaded by an import of the module, in a process of its own."""
    code = f"import sys, {module}; print(*(name for name in {names!r} if name in sys.modules))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300)
    return set(done.stdout.split())


def test_a_run_loads_no_drawing_library_and_no_templates() -> None:
    """jinja2 itself comes with torch's compiler, which megatron-core loads."""
    late = ("matplotlib", "wandb", "megatron_bicc.report", "megatron_bicc.planning")
    assert loaded("megatron_bicc.train", "torch", *late) == {"torch"}


def test_a_report_and_a_launcher_need_no_torch() -> None:
    assert loaded("megatron_bicc.report.page, megatron_bicc.launcher", "torch", "matplotlib") == {
        "matplotlib"
    }
