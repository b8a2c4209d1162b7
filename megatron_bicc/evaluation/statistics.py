"""avg@k and the unbiased pass@k over prompts.

Shape suffix: P prompts.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bicc.evaluation.answers import Answers


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
    binomials, so that nothing overflows. correct_P: int [P]. Raises ValueError unless 1 <= k <= num_samples
    and every count is within 0 and num_samples.
    """
    correct_P = np.asarray(correct_P)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples a prompt; k must be within 1 and {num_samples}")
    if correct_P.size and not 0 <= correct_P.min() <= correct_P.max() <= num_samples:
        raise ValueError(f"counts of right samples must be within 0 and {num_samples}")
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
