"""Measures the effect of RCC on gradient variance on a small softmax bandit, whose gradient is known exactly.

    python tools/bandit_variance.py --output docs/bandit_variance.md

The policy is pi = softmax(theta) over V arms with binary rewards R and expected reward J, the reference is
another softmax, delta = log pi - log pi_ref and g(a) = grad log pi(a) = e_a - pi. Two estimators of grad J:

    weighted    arms drawn from pi_ref, w (R - b) g with w = exp(delta): the estimator that RCC is derived for
    on-policy   arms drawn from pi, (R - b) g: the estimator of an on-policy GRPO step

Shape suffixes: V arms (the vocabulary of responses of one token), R rollouts of a group, B groups.
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
    """A bandit with its estimator; every expectation over arms can be enumerated."""

    policy_V: np.ndarray
    sampler_V: np.ndarray
    """The distribution that arms are drawn from: pi_ref (weighted) or pi (on-policy)."""
    weight_V: np.ndarray
    delta_V: np.ndarray
    reward_V: np.ndarray

    def mean(self, values_V: np.ndarray) -> float:
        """Returns the expectation over drawn arms."""
        return float(self.sampler_V @ values_V)

    def score_norms(self) -> np.ndarray:
        """[V]: |g(a)|^2"""
        return 1.0 - 2.0 * self.policy_V + (self.policy_V**2).sum()

    def gradient(self) -> np.ndarray:
        """Returns grad J with respect to theta, [V]."""
        return self.policy_V * (self.reward_V - self.policy_V @ self.reward_V)

    def baseline(self, name: str) -> float:
        """Returns the baseline with population expectations instead of those of a group."""
        squared_V = np.exp(2 * self.delta_V)
        if name == "optimal":  # w^2 |g|^2 in place of RCC's w^2: the true optimum among constants
            squared_V = self.weight_V**2 * self.score_norms()
        if name in ("exact", "optimal"):
            return self.mean(squared_V * self.reward_V) / self.mean(squared_V)
        mean = self.mean(self.reward_V)
        covariance = self.mean((self.reward_V - mean) * self.delta_V)
        return {"zero": 0.0, "mean": mean, "first_order": mean + 2 * covariance}[name]

    def variance(self, baseline: float) -> float:
        """Returns the trace of the covariance of one draw's estimate, by enumeration."""
        second_moment_V = (self.weight_V * (self.reward_V - baseline)) ** 2 * self.score_norms()
        return self.mean(second_moment_V) - (self.gradient() ** 2).sum()


def softmax(logits_V: np.ndarray) -> np.ndarray:
    """[V]: probabilities"""
    exp_V = np.exp(logits_V - logits_V.max())
    return exp_V / exp_V.sum()


def make_bandit(rng: np.random.Generator, estimator: str, drift: str, scale: float) -> Bandit:
    """Makes a bandit whose policy differs from the reference by logits of standard deviation `scale`.

    drift "learned": towards the rewarded arms, as in training; "random": independent of the reward.
    """
    reward_V = (rng.permutation(ARMS) < ARMS // 2).astype(np.float64)
    reference_V = rng.standard_normal(ARMS)
    step_V = (2 * reward_V - 1) if drift == "learned" else rng.standard_normal(ARMS)
    policy_V, reference_V = softmax(reference_V + scale * step_V), softmax(reference_V)
    delta_V = np.log(policy_V / reference_V)
    if estimator == "weighted":
        return Bandit(policy_V, reference_V, np.exp(delta_V), delta_V, reward_V)
    return Bandit(policy_V, policy_V, np.ones(ARMS), delta_V, reward_V)


def estimates(bandit: Bandit, name: str, in_group: bool, groups: int, seed: int) -> Iterator[np.ndarray]:
    """Yields [CHUNK, V], the gradient estimate of each group; the same seed draws the same arms."""
    rng, offsets_B = np.random.default_rng(seed), np.arange(CHUNK + 1) * GROUP_SIZE
    for _ in range(groups // CHUNK):
        arms_BR = rng.choice(ARMS, (CHUNK, GROUP_SIZE), p=bandit.sampler_V)
        reward_BR, delta_BR = bandit.reward_V[arms_BR], bandit.delta_V[arms_BR]
        baseline_B = np.full(CHUNK, bandit.baseline(name))
        if in_group and name == "mean":
            baseline_B = reward_BR.mean(axis=1)
        elif in_group and name in ("first_order", "exact"):
            baseline_B = rcc_baseline(reward_BR.ravel(), delta_BR.ravel(), offsets_B, name).baseline_B
        coefficient_BR = bandit.weight_V[arms_BR] * (reward_BR - baseline_B[:, None]) / GROUP_SIZE
        estimate_BV = -coefficient_BR.sum(axis=1)[:, None] * bandit.policy_V
        np.add.at(estimate_BV, (np.arange(CHUNK)[:, None], arms_BR), coefficient_BR)
        yield estimate_BV


def measure(bandit: Bandit, name: str, in_group: bool, groups: int, seed: int) -> tuple[float, float, float]:
    """Returns (variance per draw, standard error, |mean - grad J| / |grad J|) from two or more chunks."""
    chunks = list(estimates(bandit, name, in_group, groups, seed))
    variances = [GROUP_SIZE * chunk_BV.var(axis=0, ddof=1).sum() for chunk_BV in chunks]
    gradient_V = bandit.gradient()
    bias_V = np.mean([chunk_BV.mean(axis=0) for chunk_BV in chunks], axis=0) - gradient_V
    error = np.std(variances, ddof=1) / np.sqrt(len(variances))
    return float(np.mean(variances)), float(error), float(np.linalg.norm(bias_V) / np.linalg.norm(gradient_V))


def measured_rows(groups: int, seed: int) -> Iterator[str]:
    """Yields the rows of one bandit: variance by enumeration and measured, population and in-group."""
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
    """Yields the rows of many bandits: median variance relative to the mean baseline's, share below 1."""
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

Written by `python tools/bandit_variance.py --groups {groups} --bandits {bandits} --seed {seed}`.
Its docstring defines the bandit ({arms} arms, half of them rewarded) and the two estimators. Variance is the
trace of the covariance of one draw's gradient estimate. `optimal` is the true best constant,
E[w² |g|² R] / E[w² |g|²].

## One bandit, measured

The policy has learned: its logits are 0.5 above the reference's at rewarded arms and 0.5 below at others.
"Population" uses expectations over all arms in the baseline: a constant, so the estimate is unbiased. "In
group" computes it from the {group_size} draws themselves, as in training: the table has the variance times
{group_size} and the bias.

| estimator | baseline | b | variance, enumerated | measured, population | measured, in group | bias |
|---|---|---|---|---|---|---|
{measured}

## {bandits} random bandits, enumerated

Variance relative to that of the mean baseline (median over bandits; below 1 is better) and the share of
bandits where it is smaller. `scale` is the distance of the policy's logits from the reference's: towards the
rewarded arms (learned) or in a random direction (random).

| estimator | drift | scale | first_order | better in | exact | better in | optimal |
|---|---|---|---|---|---|---|---|
{enumerated}
"""


def main(arguments: list[str]) -> None:
    """Writes the two tables as Markdown."""
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
