"""Reading back what a run wrote."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bicc.monitoring import jsonl
from megatron_bicc.monitoring.writer import GROUPS_FILE, METRICS_FILE


@dataclass(frozen=True)
class Run:
    """The metrics of a run, by step."""

    name: str
    records: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it was recorded, possibly nowhere; null reads as NaN."""
        points = [(r["step"], r[key]) for r in self.records if key in r]
        return [step for step, _ in points], [math.nan if value is None else value for _, value in points]

    def values(self, key: str) -> list[float]:
        """The finite values of a metric."""
        return [value for value in self.series(key)[1] if math.isfinite(value)]


def read_run(run_dir: str | Path) -> Run:
    """The run in a directory; of a step written twice, the later line counts.

    Raises ValueError that names the file if metrics.jsonl is missing or broken.
    """
    path = Path(run_dir) / METRICS_FILE
    by_step = {_step(record, path): record for record in jsonl.read(path)}
    return Run(Path(run_dir).resolve().name, [by_step[step] for step in sorted(by_step)])


def read_groups(run_dir: str | Path) -> list[dict[str, Any]]:
    """The groups in a run's groups.jsonl, by step; empty if it wrote none."""
    path = Path(run_dir) / GROUPS_FILE
    records = jsonl.read(path) if path.exists() else []
    return sorted(records, key=lambda record: _step(record, path))


def _step(record: dict[str, Any], path: Path) -> int:
    if not isinstance(record.get("step"), int):
        raise ValueError(f"{path}: a line without a step: {str(record)[:80]}")
    return record["step"]
