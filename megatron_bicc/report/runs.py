"""Reads the files that a run wrote: metrics, settings, groups, packed layouts."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_bicc.config import flatten
from megatron_bicc.errors import UserError
from megatron_bicc.files import read_jsonl
from megatron_bicc.metrics import GROUPS_FILE, LAYOUT_FILE, METRICS_FILE, SETTINGS_FILE


@dataclass(frozen=True)
class Run:
    """The metrics of a run, by step, and its settings."""

    name: str
    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted name; empty if the run did not record them"""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of a metric, empty if it was never recorded; null is read as NaN."""
        points = [(r["step"], r[key]) for r in self.records if key in r]
        return [step for step, _ in points], [math.nan if value is None else value for _, value in points]

    def values(self, key: str) -> list[float]:
        """Returns the finite values of a metric."""
        return [value for value in self.series(key)[1] if math.isfinite(value)]


def read_run(run_dir: str | Path) -> Run:
    """Reads the run in a directory; if a step was written twice, the later line counts.

    Raises UserError, with the file, if metrics.jsonl is missing, or it or config.yaml is broken.
    """
    path = Path(run_dir) / METRICS_FILE
    by_step = {_step(record, path): _numbers(record, path) for record in read_jsonl(path)}
    records = [by_step[step] for step in sorted(by_step)]
    return Run(Path(run_dir).resolve().name, records, _read_settings(Path(run_dir) / SETTINGS_FILE))


def read_groups(run_dir: str | Path) -> list[dict[str, Any]]:
    """Reads a run's groups.jsonl, sorted by step; empty if there is no such file."""
    return _by_step(Path(run_dir) / GROUPS_FILE, {"prompt", "rollouts"})


def read_layouts(run_dir: str | Path) -> list[dict[str, Any]]:
    """Reads a run's layout.jsonl, sorted by step; empty if there is no such file."""
    return _by_step(Path(run_dir) / LAYOUT_FILE, {"plans", "budget"})


def _by_step(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    records = read_jsonl(path) if path.exists() else []
    for record in records:
        if missing := keys - record.keys():
            raise UserError(f"{path}: a line without {', '.join(sorted(missing))}: {str(record)[:80]}")
    return sorted(records, key=lambda record: _step(record, path))


def _step(record: dict[str, Any], path: Path) -> int:
    if type(record.get("step")) is not int:
        raise UserError(f"{path}: a line without a step: {str(record)[:80]}")
    return record["step"]


def _numbers(record: dict[str, Any], path: Path) -> dict[str, Any]:
    for key, value in record.items():
        if value is not None and not isinstance(value, int | float):
            raise UserError(f"{path}, step {record['step']}: {key} is not a number: {str(value)[:80]!r}")
    return record


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not the settings of a run; remove it") from error
    return flatten(settings) if isinstance(settings, dict) else {}
