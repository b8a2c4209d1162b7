"""Reads the output of finished runs in forms that can be compared."""

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor


def metrics(out: Path) -> list[dict]:
    """Returns metrics.jsonl without the times, which differ between runs."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def state(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's weights and the optimizer's tensors and numbers, by dotted name. Needs a process
    group."""
    return _flat(dist_checkpointing.load_plain_tensors(str(checkpoint)))


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in _flat(value, f"{name}.{key}".lstrip(".")).items()}


def assert_equal(held: dict[str, Any], expected: dict[str, Any]) -> None:
    """Asserts that two states are equal to the bit."""
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(held[name], value) if isinstance(value, Tensor) else held[name] == value
        assert same, name


def progress(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's progress without the run's settings, which name directories and servers."""
    return json.loads((checkpoint / "progress.json").read_text()) | {"config": None}


def one_line(ended: dict) -> str:
    """Returns the error line of a failed run, given {"status": exit status, "err": stderr}."""
    assert ended["status"] == 2, ended
    (line,) = [line for line in ended["err"].splitlines() if "error: " in line]
    assert "Traceback" not in ended["err"]
    return line
