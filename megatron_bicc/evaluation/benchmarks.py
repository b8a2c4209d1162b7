"""Samples and scores answers to held-out prompts, during training and in a separate evaluation.

avg@k and pass@k, the file of scored answers from which an evaluation resumes, results.json and a table.

Shape suffix: B prompts.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from megatron_bicc import run_lock
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.files import append_jsonl, atomic_file, keep_jsonl, read_jsonl
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.types import Group


@dataclass(frozen=True)
class Answers:
    """The scored answers to one prompt; every list has one entry per sample."""

    index: int
    """Row of the prompt in its file, from 0"""
    rewards: list[float]
    lengths: list[int]
    """Tokens, the end token included"""
    truncated: list[bool]
    """True if the sample was cut off at rollout.max_new_tokens"""
    texts: list[str]


def answers_of(group: Group) -> Answers:
    """Returns the answers of a scored group."""
    return Answers(
        group.prompt.index,
        [float(reward) for reward in group.rewards],
        [len(sample.token_ids) for sample in group.samples],
        [sample.finish_reason == "length" for sample in group.samples],
        group.texts,
    )


class AnswerFile:
    """A .jsonl file: a line with everything that decides the figures, then one line per finished prompt."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """settings: JSON values by name, compared with those of an existing file."""
        self.path, self.settings = path, settings

    def load(self) -> dict[int, Answers]:
        """Returns the answers by prompt index; empty if there is no file.

        Raises UserError if the file was made with other settings, which it names, or has a line that is not
        an answer.
        """
        records = read_jsonl(self.path) if self.path.exists() else []
        if not records:
            self.path.unlink(missing_ok=True)
            return {}
        self._check(records[0].get("settings"))
        return dict(self._answer(number, record) for number, record in enumerate(records[1:], start=2))

    def kept_settings(self) -> dict[str, Any]:
        """Returns the settings in the file; empty if there is no file, or none in it."""
        records = read_jsonl(self.path) if self.path.exists() else []
        found = records[0].get("settings") if records else None
        return found if isinstance(found, dict) else {}

    def keep(self, indices: set[int]) -> None:
        """Drops the answers to all prompts but these."""
        if not self.path.exists():
            return
        keep_jsonl(self.path, lambda record: "settings" in record or record["index"] in indices)

    def append(self, answers: Iterable[Answers]) -> None:
        """Appends answers and returns once they are on disk. A new file begins with the settings."""
        if not self.path.exists():
            append_jsonl(self.path, [{"settings": self.settings}])
        append_jsonl(self.path, (asdict(one) for one in answers))

    def _answer(self, number: int, record: dict[str, Any]) -> tuple[int, Answers]:
        try:
            return record["index"], Answers(**record)
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path}, line {number}: not an answer; remove the line") from error

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{self.path}, line 1: no settings; delete the file or choose another --out")
        names = found.keys() | self.settings.keys()
        differ = sorted(n for n in names if found.get(n) != self.settings.get(n))
        if differ:
            listed = "; ".join(f"{n} was {found.get(n)!r}, is {self.settings.get(n)!r}" for n in differ)
            raise UserError(
                f"{self.path}: made with other settings: {listed}; set them back or choose another --out"
            )


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error."""

    value: float
    standard_error: float
    """Standard error of the mean over prompts; NaN for a single prompt"""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on a set of prompts."""

    prompts: int
    samples: int
    """k: samples per prompt"""
    avg: Estimate
    """avg@k: mean over prompts of the share of correct samples; equal to the unbiased pass@1"""
    pass_at: dict[int, Estimate]
    """Unbiased pass@j by j: every power of two up to k, and k"""
    truncated: float
    """Share of the samples cut off at rollout.max_new_tokens"""
    length: float
    """Mean length of a sample in tokens"""


def pass_at_k(num_samples: int, correct_B: np.ndarray, k: int) -> np.ndarray:
    """Returns float64 [B]: the probability that at least one of k samples is correct.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, section 2.1) with n = num_samples and
    c = correct_B, int [B], computed as a product without binomials, which would overflow. Raises UserError
    unless 1 <= k <= num_samples and every count is within 0 and num_samples.
    """
    correct_B = np.asarray(correct_B)
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k} of {num_samples} samples per prompt; k must be within 1 and {num_samples}")
    if correct_B.size and not 0 <= correct_B.min() <= correct_B.max() <= num_samples:
        raise UserError(f"counts of correct samples must be within 0 and {num_samples}")
    # 0 at k: with fewer than k wrong samples, none of k can miss
    factors = 1.0 - k / np.arange(num_samples, 0, -1)
    missed = np.concatenate([[1.0], np.cumprod(factors)])
    return 1.0 - missed[correct_B]


def summarize(answers: list[Answers], threshold: float) -> Evaluation:
    """Computes the figures of answers, equally many per prompt; a reward above the threshold is correct."""
    rewards = np.array([one.rewards for one in answers])
    correct_B, samples = (rewards > threshold).sum(1), rewards.shape[1]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return Evaluation(
        prompts=len(answers),
        samples=samples,
        avg=_estimate(correct_B / samples),
        pass_at={k: _estimate(pass_at_k(samples, correct_B, k)) for k in ks},
        truncated=float(np.mean([one.truncated for one in answers])),
        length=float(np.mean([one.lengths for one in answers])),
    )


def _estimate(values_B: np.ndarray) -> Estimate:
    count = len(values_B)
    error = float(values_B.std(ddof=1) / count**0.5) if count > 1 else float("nan")
    return Estimate(float(values_B.mean()), error)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Returns the metrics of an evaluation during training; avg@k is logged as the unbiased pass@1."""
    return {
        "eval/pass_at_1_stderr": evaluation.avg.standard_error,
        "eval/truncated": evaluation.truncated,
        "eval/length_mean": evaluation.length,
    } | {f"eval/pass_at_{k}": estimate.value for k, estimate in evaluation.pass_at.items()}


def write_results(folder: Path, settings: dict[str, Any], evaluations: dict[str, Evaluation]) -> str:
    """Writes results.json and results.md, and returns the table. evaluations: by name of the benchmark."""
    benchmarks = {name: _plain(evaluation) for name, evaluation in evaluations.items()}
    record = {"settings": settings, "benchmarks": benchmarks}
    text = table(evaluations)
    with atomic_file(folder / "results.json") as draft:
        draft.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    with atomic_file(folder / "results.md") as draft:
        draft.write_text(text)
    return text


def table(evaluations: dict[str, Evaluation]) -> str:
    """Returns a Markdown table, one row per benchmark, with standard errors. Needs at least one benchmark."""
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
    """Returns JSON values; a standard error of one prompt is null."""
    estimates = {"avg": evaluation.avg} | {f"pass_at_{k}": e for k, e in evaluation.pass_at.items()}
    plain = {
        name: {n: None if math.isnan(v) else v for n, v in asdict(estimate).items()}
        for name, estimate in estimates.items()
    }
    counts = {"prompts": evaluation.prompts, "samples": evaluation.samples}
    return counts | plain | {"truncated": evaluation.truncated, "length": evaluation.length}


def run_benchmark(
    name: str,
    prompts: list[Prompt],
    ask: Callable[[list[Prompt]], list[Answers]],
    file: AnswerFile,
    prompts_at_once: int,
) -> list[Answers]:
    """Returns the answers to all prompts, in order; those in `file` are not sampled again. Collective.

    Prompts are sampled in fixed batches, and an unfinished batch is sampled again as a whole: the composition
    of a batch can change the last bits of an engine's log-probs. So a resumed evaluation ends with the same
    figures to the bit.
    """
    first_process = dist.get_rank() == 0
    done = _from_first(file.load() if first_process else {})
    batches = [prompts[i : i + prompts_at_once] for i in range(0, len(prompts), prompts_at_once)]
    waiting = [batch for batch in batches if any(prompt.index not in done for prompt in batch)]
    unfinished = {prompt.index for batch in waiting for prompt in batch}
    done = {index: answers for index, answers in done.items() if index not in unfinished}
    if first_process:
        file.keep(set(done))
    bar = tqdm(total=len(prompts), initial=len(done), desc=name, unit="prompt", disable=not first_process)
    with bar:
        for batch in waiting:
            answers = ask(batch)
            if first_process:
                run_lock.check()
                file.append(answers)
            done |= {one.index: one for one in answers}
            bar.update(len(batch))
    return [done[prompt.index] for prompt in prompts]


def _from_first(value: dict[int, Answers]) -> dict[int, Answers]:
    """Returns the first process's value on every process. Collective."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def names_of(paths: list[str]) -> dict[str, str]:
    """Returns paths by benchmark name: the file's stem, prefixed by its directory if stems collide.

    Raises UserError for two files that would still have the same name.
    """
    stems = [Path(path).stem for path in paths]
    named: dict[str, str] = {}
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{Path(path).resolve().parent.name}_{stem}"
        if name in named:
            raise UserError(
                f"--benchmark {path}: {named[name]} would be named {name} too; rename one of them"
            )
        named[name] = path
    return named


def ask(prompts: list[Prompt], sampler: GroupSampler, seed: int) -> list[Answers]:
    """Samples and scores answers to every prompt, with the same seeds at every call. Collective."""
    return [answers_of(group) for group in sampler.collect(prompts, (seed, "evaluation"))]


def evaluate(prompts: list[Prompt], sampler: GroupSampler, seed: int, threshold: float) -> Evaluation:
    """Returns avg@k and pass@k from k = sampler.group_size answers to every prompt. Collective."""
    return summarize(ask(prompts, sampler, seed), threshold)
