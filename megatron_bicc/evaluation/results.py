"""The scored answers to one prompt, and the file that keeps those of a benchmark.

avg@k and the unbiased pass@k over prompts.

Shape suffix: P prompts.

What an evaluation tells: results.json and a table.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bicc.errors import UserError
from megatron_bicc.files import append_jsonl, atomic_file, keep_jsonl, read_jsonl
from megatron_bicc.rollout.types import Group


@dataclass(frozen=True)
class Answers:
    """What was answered to one prompt; every list has an entry a sample."""

    index: int
    """Row of the prompt in its file, from 0"""
    rewards: list[float]
    lengths: list[int]
    """Tokens, the end token included"""
    truncated: list[bool]
    """Whether the sample ended at rollout.max_new_tokens"""
    texts: list[str]


def answers_of(group: Group) -> Answers:
    """The answers of a scored group."""
    return Answers(
        group.prompt.index,
        [float(reward) for reward in group.rewards],
        [len(sample.token_ids) for sample in group.samples],
        [sample.finish_reason == "length" for sample in group.samples],
        group.texts,
    )


class AnswerFile:
    """A .jsonl file: first a line with what decides the figures, then a line a finished prompt."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """settings: JSON values by name."""
        self.path, self.settings = path, settings

    def load(self) -> dict[int, Answers]:
        """Answers by prompt index; none if there is no file.

        Raises UserError that names the settings under which the file was made, where they are others, or a
        line that is no answer.
        """
        records = read_jsonl(self.path) if self.path.exists() else []
        if not records:
            self.path.unlink(missing_ok=True)
            return {}
        self._check(records[0].get("settings"))
        return dict(self._answer(number, record) for number, record in enumerate(records[1:], start=2))

    def kept_settings(self) -> dict[str, Any]:
        """The settings under which the file was made; none if there is no file, or none in it."""
        records = read_jsonl(self.path) if self.path.exists() else []
        found = records[0].get("settings") if records else None
        return found if isinstance(found, dict) else {}

    def keep(self, indices: set[int]) -> None:
        """Drops the answers to all other prompts."""
        if not self.path.exists():
            return
        keep_jsonl(self.path, lambda record: "settings" in record or record["index"] in indices)

    def append(self, answers: Iterable[Answers]) -> None:
        """Returns once they are on disk. A new file begins with the settings."""
        if not self.path.exists():
            append_jsonl(self.path, [{"settings": self.settings}])
        append_jsonl(self.path, (asdict(one) for one in answers))

    def _answer(self, number: int, record: dict[str, Any]) -> tuple[int, Answers]:
        try:
            return record["index"], Answers(**record)
        except (KeyError, TypeError):
            raise UserError(f"{self.path}, line {number}: not an answer; remove the line") from None

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{self.path}, line 1: no settings; delete the file, or give another --out")
        names = found.keys() | self.settings.keys()
        differ = sorted(n for n in names if found.get(n) != self.settings.get(n))
        if differ:
            listed = "; ".join(f"{n} was {found.get(n)!r}, is {self.settings.get(n)!r}" for n in differ)
            raise UserError(
                f"{self.path}: made with other settings: {listed}; set them back, or give another --out"
            )


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts."""

    value: float
    standard_error: float
    """Of the mean over prompts; NaN for a single one"""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on a set of prompts."""

    prompts: int
    samples: int
    """k: samples a prompt"""
    avg: Estimate
    """avg@k: mean over prompts of the share of correct samples; it is also the unbiased pass@1"""
    pass_at: dict[int, Estimate]
    """Unbiased pass@k for every power of two up to the samples, and for all of them"""
    truncated: float
    """Share of the samples that ended at the longest length allowed"""
    length: float
    """Mean length of a sample in tokens"""


def pass_at_k(num_samples: int, correct_P: np.ndarray, k: int) -> np.ndarray:
    """float64 [P]: the chance that of k samples at least one is right, from c right ones of num_samples.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, section 2.1), as a product without
    binomials, so that nothing overflows. correct_P: int [P]. Raises UserError unless 1 <= k <= num_samples
    and every count is within 0 and num_samples.
    """
    correct_P = np.asarray(correct_P)
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k} of {num_samples} samples a prompt; k must be within 1 and {num_samples}")
    if correct_P.size and not 0 <= correct_P.min() <= correct_P.max() <= num_samples:
        raise UserError(f"counts of right samples must be within 0 and {num_samples}")
    factors = 1.0 - k / np.arange(num_samples, 0, -1)  # 0 at k, so nothing beyond counts
    missed = np.concatenate([[1.0], np.cumprod(factors)])
    return 1.0 - missed[correct_P]


def summarize(answers: list[Answers], threshold: float) -> Evaluation:
    """Figures of answers with equally many samples each; one is right if its reward is above threshold."""
    rewards = np.array([one.rewards for one in answers])
    correct_P, samples = (rewards > threshold).sum(1), rewards.shape[1]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return Evaluation(
        prompts=len(answers),
        samples=samples,
        avg=_estimate(correct_P / samples),
        pass_at={k: _estimate(pass_at_k(samples, correct_P, k)) for k in ks},
        truncated=float(np.mean([one.truncated for one in answers])),
        length=float(np.mean([one.lengths for one in answers])),
    )


def _estimate(values_P: np.ndarray) -> Estimate:
    count = len(values_P)
    error = float(values_P.std(ddof=1) / count**0.5) if count > 1 else float("nan")
    return Estimate(float(values_P.mean()), error)


def write_results(folder: Path, settings: dict[str, Any], evaluations: dict[str, Evaluation]) -> str:
    """Writes results.json and results.md; returns the table. evaluations: by the benchmark's name."""
    benchmarks = {name: _plain(evaluation) for name, evaluation in evaluations.items()}
    record = {"settings": settings, "benchmarks": benchmarks}
    text = table(evaluations)
    for name, content in (
        ("results.json", json.dumps(record, indent=1, allow_nan=False) + "\n"),
        ("results.md", text),
    ):
        with atomic_file(folder / name) as draft:
            draft.write_text(content)
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


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of an evaluation on held-out prompts (docs/metrics.md); avg@k is the unbiased pass@1."""
    return {
        "eval/pass_at_1_stderr": evaluation.avg.standard_error,
        "eval/truncated": evaluation.truncated,
        "eval/length_mean": evaluation.length,
    } | {f"eval/pass_at_{k}": estimate.value for k, estimate in evaluation.pass_at.items()}
