"""Reads the figures of every run from metrics.jsonl, keeps them in one CSV file, and summarizes each run."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiment.arms import MAIN, VARIANTS, Job
from experiment.runner import is_finished
from megatron_bicc.report.runs import read_run

METRICS = {
    "pass_at_1": "eval/pass_at_1",
    "reward": "reward/mean",
    "gradient_variance": "train/gradient_variance",
    "gradient_noise": "train/gradient_noise",
    "grad_norm": "train/grad_norm",
    "cov": "rcc/cov",
    "baseline_shift": "rcc/baseline_shift",
    "delta_gap": "delta/gap",
    "ratio_right": "ratio/right/mean",
    "ratio_wrong": "ratio/wrong/mean",
    "clip_right_high": "clip/right/high",
    "clip_wrong_low": "clip/wrong/low",
    "clip_wrong_dual": "clip/wrong/dual",
    "context_tokens": "tokens/context",
}
"""Column: metric of docs/metrics.md. A further column is `tokens`, the training tokens so far"""
COLUMNS = ("arm", "seed", "step", "tokens", *METRICS)
THRESHOLD = 0.85
"""Held-out pass@1 that "steps to" and "tokens to" refer to"""


@dataclass(frozen=True)
class Curve:
    """One run; every array has one entry per step, from step 0, NaN if the metric was not recorded."""

    arm: str
    seed: int
    columns: dict[str, np.ndarray]
    """float64 [steps + 1]"""

    def at_evaluations(self, column: str) -> np.ndarray:
        """Returns float64 [evaluations]: the column at the steps with an evaluation."""
        return self.columns[column][np.isfinite(self.columns["pass_at_1"])]


def collect(out: Path) -> list[Curve]:
    """Returns the curves of the finished runs of all compared arms."""
    compared = [Job(arm, seed) for arm in (*MAIN, *VARIANTS) for seed in range(1, arm.seeds + 1)]
    return [_curve(job, out / job.folder) for job in compared if is_finished(out, job)]


def _curve(job: Job, folder: Path) -> Curve:
    records = read_run(folder).records
    columns = {
        name: np.array([np.nan if r.get(metric) is None else r[metric] for r in records])
        for name, metric in METRICS.items()
    }
    columns["step"] = np.array([r["step"] for r in records], dtype=float)
    columns["tokens"] = np.cumsum([r.get("tokens/packed", 0.0) for r in records])
    return Curve(job.arm.name, job.seed, columns)


def write(curves: list[Curve], path: Path) -> None:
    """Writes one row per run and step, with six significant digits."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for curve in curves:
            for values in zip(*(curve.columns[name] for name in COLUMNS[2:]), strict=True):
                cells = ["" if np.isnan(v) else f"{v:.6g}" for v in values]
                writer.writerow([curve.arm, curve.seed, *cells])


def read(path: Path) -> list[Curve]:
    """Reads a file that `write` wrote."""
    rows = defaultdict(list)
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            rows[row["arm"], int(row["seed"])].append(row)
    return [
        Curve(arm, seed, {name: np.array([float(r[name] or "nan") for r in own]) for name in COLUMNS[2:]})
        for (arm, seed), own in rows.items()
    ]


def summary(curve: Curve) -> dict[str, float]:
    """Returns the figures of a run that are compared between arms."""
    steps, tokens, passed = (curve.at_evaluations(name) for name in ("step", "tokens", "pass_at_1"))
    early = slice(1, 9)
    cov = curve.columns["cov"][1:]
    third = len(cov) // 3
    return {
        "final": float(passed[-1]),
        "area": float(passed[1:].mean()),
        "steps_to": crossing(steps, passed),
        "tokens_to": crossing(tokens, passed),
        "tokens": float(tokens[-1]),
        "context": float(np.nansum(curve.columns["context_tokens"])),
        "early_variance": float(np.nanmean(curve.columns["gradient_variance"][early])),
        "early_noise": float(np.nanmean(curve.columns["gradient_noise"][early])),
        "cov_first": float(np.nanmean(cov[:third])),
        "cov_last": float(np.nanmean(cov[-third:])),
    } | {
        name: float(np.nanmean(curve.columns[name]))
        for name in ("ratio_right", "ratio_wrong", "clip_right_high", "clip_wrong_low", "clip_wrong_dual")
    }


def crossing(x: np.ndarray, passed: np.ndarray) -> float:
    """Returns x where pass@1 first reaches THRESHOLD, interpolated linearly; NaN if it never does."""
    above = np.flatnonzero(passed >= THRESHOLD)
    if not len(above):
        return float("nan")
    i = int(above[0])
    if i == 0:
        return float(x[0])
    share = (THRESHOLD - passed[i - 1]) / (passed[i] - passed[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))
