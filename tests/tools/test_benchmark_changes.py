"""Tests `tools/benchmark.py changes`."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_few_elements_change_at_a_small_learning_rate(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = ["tools/benchmark.py", "changes", "--steps", "1", "--json", str(figures)]
    subprocess.run([sys.executable, "-W", "ignore", *command], cwd=REPOSITORY, check=True)
    (step,) = json.loads(figures.read_text())["steps"]
    assert 0.001 < step["changed"] < 0.05
    # three times the bytes of the changed elements, and the file's table
    assert step["changed"] < step["sent"] < 3 * step["changed"] + 0.02
