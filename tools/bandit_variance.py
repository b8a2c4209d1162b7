"""Measure what RCC does to gradient variance where everything is known: a small softmax bandit.

    python tools/bandit_variance.py --output docs/bandit_variance.md

The policy is pi = softmax(theta) over K arms with binary rewards R and expected reward J, the reference is
another softmax, delta = log pi - log pi_ref and g(a) = grad log pi(a) = e_a - pi. Two estimators of grad J:

    weighted    arms drawn from pi_ref, w (R - b) g with w = exp(delta): the one that RCC is derived for
    on-policy   arms drawn from pi, (R - b) g: the one that a GRPO step starts from

Shape suffixes: K arms, G rollouts of a group, B groups.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bicc.algorithms.advantages import rcc_baseline

ARMS, GROUP_SIZE, CHUNK = 12, 8, 5_000
BASELINES = ("zero", "mean", "first_order", "exact", "optimal")


@dataclass(frozen=True)
class Bandit:
    """One bandit with its estimator; every expectation over an arm can be enumerated."""

    policy_K: np.ndarray
    sampler_K: np.ndarray
    """The distribution that arms are drawn from: pi_ref (weighted) or pi (on-policy)."""
    weight_K: np.ndarray
    delta_K: np.ndarray
    reward_K: np.ndarray

    def mean(self, values_K: np.ndarray) -> float:
        """Expectation over drawn arms."""
        return float(self.sampler_K @ values_K)

    def score_norms(self) -> np.ndarray:
        """[K]: |g(a)|^2"""
        return 1.0 - 2.0 * self.policy_K + (self.policy_K**2).sum()

    def gradient(self) -> np.ndarray:
        """[K]: grad J in theta"""
        return self.policy_K * (self.reward_K - self.policy_K @ self.reward_K)

    def baseline(self, name: str) -> float:
        """The baseline with population expectations in place of the group's."""
        squared_K = np.exp(2 * self.delta_K)
        if name == "optimal":  # w^2 |g|^2 in place of RCC's w^2: the true optimum among constants
            squared_K = self.weight_K**2 * self.score_norms()
        if name in ("exact", "optimal"):
            return self.mean(squared_K * self.reward_K) / self.mean(squared_K)
        mean = self.mean(self.reward_K)
        covariance = self.mean((self.reward_K - mean) * self.delta_K)
        return {"zero": 0.0, "mean": mean, "first_order": mean + 2 * covariance}[name]

    def variance(self, baseline: float) -> float:
        """Trace of the covariance of one draw's estimate, by enumeration."""
        second_moment_K = (self.weight_K * (self.reward_K - baseline)) ** 2 * self.score_norms()
        return self.mean(second_moment_K) - (self.gradient() ** 2).sum()


def softmax(logits_K: np.ndarray) -> np.ndarray:
    """[K]: probabilities"""
    exp_K = np.exp(logits_K - logits_K.max())
    return exp_K / exp_K.sum()


def make_bandit(rng: np.random.Generator, estimator: str, drift: str, scale: float) -> Bandit:
    """A bandit whose policy left the reference by logits of standard deviation `scale`.

    drift "learned": towards the rewarded arms, as training moves it; "random": in no relation to reward.
    """
    reward_K = (rng.permutation(ARMS) < ARMS // 2).astype(np.float64)
    reference_K = rng.standard_normal(ARMS)
    step_K = (2 * reward_K - 1) if drift == "learned" else rng.standard_normal(ARMS)
    policy_K, reference_K = softmax(reference_K + scale * step_K), softmax(reference_K)
    delta_K = np.log(policy_K / reference_K)
    if estimator == "weighted":
        return Bandit(policy_K, reference_K, np.exp(delta_K), delta_K, reward_K)
    return Bandit(policy_K, policy_K, np.ones(ARMS), delta_K, reward_K)


def estimates(bandit: Bandit, name: str, in_group: bool, groups: int, seed: int) -> Iterator[np.ndarray]:
    """[CHUNK, K] at a time: the gradient estimate of each group; the same seed draws the same arms."""
    rng, offsets_B = np.random.default_rng(seed), np.arange(CHUNK + 1) * GROUP_SIZE
    for _ in range(groups // CHUNK):
        arms_BG = rng.choice(ARMS, (CHUNK, GROUP_SIZE), p=bandit.sampler_K)
        reward_BG, delta_BG = bandit.reward_K[arms_BG], bandit.delta_K[arms_BG]
        baseline_B = np.full(CHUNK, bandit.baseline(name))
        if in_group and name == "mean":
            baseline_B = reward_BG.mean(axis=1)
        elif in_group and name in ("first_order", "exact"):
            baseline_B = rcc_baseline(reward_BG.ravel(), delta_BG.ravel(), offsets_B, name).baseline_B
        coefficient_BG = bandit.weight_K[arms_BG] * (reward_BG - baseline_B[:, None]) / GROUP_SIZE
        estimate_BK = -coefficient_BG.sum(axis=1)[:, None] * bandit.policy_K
        np.add.at(estimate_BK, (np.arange(CHUNK)[:, None], arms_BG), coefficient_BG)
        yield estimate_BK


def measure(bandit: Bandit, name: str, in_group: bool, groups: int, seed: int) -> tuple[float, float, float]:
    """(variance a draw, its standard error, |mean - grad J| / |grad J|), over at least two chunks."""
    chunks = list(estimates(bandit, name, in_group, groups, seed))
    variances = [GROUP_SIZE * chunk_BK.var(axis=0, ddof=1).sum() for chunk_BK in chunks]
    gradient_K = bandit.gradient()
    bias_K = np.mean([chunk_BK.mean(axis=0) for chunk_BK in chunks], axis=0) - gradient_K
    error = np.std(variances, ddof=1) / np.sqrt(len(variances))
    return float(np.mean(variances)), float(error), float(np.linalg.norm(bias_K) / np.linalg.norm(gradient_K))


def measured_rows(groups: int, seed: int) -> Iterator[str]:
    """One bandit, every baseline: variance by enumeration and measured, population and in-group."""
    for estimator in ("weighted", "on-policy"):
        bandit = make_bandit(np.random.default_rng(seed), estimator, "learned", 0.5)
        for name in BASELINES:
            baseline = bandit.baseline(name)
            variance, error, _ = measure(bandit, name, False, groups, seed)
            cells = [estimator, name, f"{baseline:.4f}", f"{bandit.variance(baseline):.4f}"]
            cells += [f"{variance:.4f} ± {error:.4f}"]
            if name in ("mean", "first_order", "exact"):
                variance, error, bias = measure(bandit, name, True, groups, seed)
                cells += [f"{variance:.4f} ± {error:.4f}", f"{100 * bias:.1f} %"]
            else:
                cells += ["", ""]
            yield "| " + " | ".join(cells) + " |"


def enumerated_rows(bandits: int, seed: int) -> Iterator[str]:
    """Many bandits: variance relative to that of the mean baseline, median, and how often it is smaller."""
    for estimator in ("weighted", "on-policy"):
        for drift in ("learned", "random"):
            for scale in (0.1, 0.3, 1.0):
                rng = np.random.default_rng(seed)
                drawn = [make_bandit(rng, estimator, drift, scale) for _ in range(bandits)]
                cells = [estimator, drift, f"{scale}"]
                for name in ("first_order", "exact", "optimal"):
                    ratios = [b.variance(b.baseline(name)) / b.variance(b.baseline("mean")) for b in drawn]
                    cells.append(f"{np.median(ratios):.3f}")
                    if name != "optimal":
                        cells.append(f"{100 * np.mean(np.array(ratios) < 1):.0f} %")
                yield "| " + " | ".join(cells) + " |"


DOCUMENT = """# Gradient variance of the baselines on a softmax bandit

Made by `python tools/bandit_variance.py --groups {groups} --bandits {bandits} --seed {seed}`; its docstring
defines the bandit ({arms} arms, half of them rewarded) and the two estimators. Variance is the trace of the
covariance of one draw's gradient estimate. `optimal` is the true best constant, E[w² |g|² R] / E[w² |g|²].

## One bandit, measured

The policy has learned: logits of the rewarded arms up by 0.5, of the others down by 0.5. "Population" puts
the expectation over all arms in the baseline: a constant, so the estimate is unbiased. "In group" computes it
from the {group_size} draws themselves, as training does: variance times {group_size}, and the bias beside it.

| estimator | baseline | b | variance, enumerated | measured, population | measured, in group | bias |
|---|---|---|---|---|---|---|
{measured}

## {bandits} random bandits, enumerated

Variance relative to that of the mean baseline (median over bandits; below 1 is better) and the share of
bandits where it is smaller. `scale` is how far the policy's logits left the reference's: towards the
rewarded arms (learned) or anywhere (random).

| estimator | drift | scale | first_order | better in | exact | better in | optimal |
|---|---|---|---|---|---|---|---|
{enumerated}
"""


def main(arguments: list[str]) -> None:
    """Write the two tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/bandit_variance.md"), help="file to write")
    parser.add_argument("--groups", type=int, default=200_000, help=f"groups to draw, in chunks of {CHUNK}")
    parser.add_argument("--bandits", type=int, default=300, help="random bandits to enumerate")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same tables")
    options = parser.parse_args(arguments)
    if options.groups < 2 * CHUNK:
        parser.error(f"--groups is {options.groups}; it must be at least {2 * CHUNK}")
    options.output.write_text(
        DOCUMENT.format(
            arms=ARMS,
            group_size=GROUP_SIZE,
            groups=options.groups,
            bandits=options.bandits,
            seed=options.seed,
            measured="\n".join(measured_rows(options.groups, options.seed)),
            enumerated="\n".join(enumerated_rows(options.bandits, options.seed)),
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
