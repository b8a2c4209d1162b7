"""What an evaluation tells: results.json and a table."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_bicc.evaluation.statistics import Estimate, Evaluation


def write_results(folder: Path, settings: dict[str, Any], evaluations: dict[str, Evaluation]) -> str:
    """Writes results.json and results.md; returns the table. evaluations: by the benchmark's name."""
    benchmarks = {name: _plain(evaluation) for name, evaluation in evaluations.items()}
    record = {"settings": settings, "benchmarks": benchmarks}
    text = table(evaluations)
    _replace(folder / "results.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    _replace(folder / "results.md", text)
    return text


def table(evaluations: dict[str, Evaluation]) -> str:
    """A Markdown table with a row a benchmark, ± a standard error over prompts. At least one benchmark."""
    ks = list(next(iter(evaluations.values())).pass_at)[1:]
    samples = next(iter(evaluations.values())).samples
    head = ["benchmark", "prompts", f"avg@{samples}", *(f"pass@{k}" for k in ks), "tokens", "truncated"]
    rows = [head, ["---"] * len(head)]
    for name, e in evaluations.items():
        passes = [_percent(e.pass_at[k]) for k in ks]
        rows.append([name, str(e.prompts), _percent(e.avg), *passes, f"{e.length:.0f}", f"{e.truncated:.1%}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _percent(estimate: Estimate) -> str:
    error = "" if math.isnan(estimate.standard_error) else f" ± {100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.value:.1f}{error}"


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    """JSON values; a standard error that there is not is null."""
    estimates = {"avg": evaluation.avg} | {f"pass_at_{k}": e for k, e in evaluation.pass_at.items()}
    plain = {
        name: {n: None if math.isnan(v) else v for n, v in asdict(estimate).items()}
        for name, estimate in estimates.items()
    }
    counts = {"prompts": evaluation.prompts, "samples": evaluation.samples}
    return counts | plain | {"truncated": evaluation.truncated, "length": evaluation.length}


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".new")
    draft.write_text(text)
    os.replace(draft, path)
