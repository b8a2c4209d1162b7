"""Every preset's loss by its paper's formula, in double-precision loops over Python floats.

It does not use the package. `new` are the log-probs that a derivative is taken in; `frozen` has the same
values and replaces them wherever a paper writes a stop-gradient, so that finite differences treat it as a
constant.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Rollout:
    """One response: log-probs of its tokens, its reward, and the engine's log-probs."""

    new: list[float]
    old: list[float]
    reward: float
    engine: list[float]


Group = list[Rollout]

SIZES = (4, 3, 16, 3, 2, 5)
RIGHT = (2, 1, 1, 3, 0, 4)
"""Ragged groups: an all-right one, an all-wrong one, one right in sixteen."""


def make_groups(seed: int, noise: float) -> list[Group]:
    """Ragged groups with binary rewards and log ratios of standard deviation `noise`; some of one token."""
    rng, engine_rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    groups = []
    for size, right in zip(SIZES, RIGHT, strict=True):
        group = []
        for index in range(size):
            length = 1 if index == 0 else int(rng.integers(1, 7))
            old = -rng.exponential(1.5, length)
            new = old + noise * rng.standard_normal(length)
            engine = old + 0.5 * engine_rng.standard_normal(length)
            group.append(Rollout(new.tolist(), old.tolist(), float(index < right), engine.tolist()))
        groups.append(group)
    return groups


def advantages(group: Group, normalized: bool, baseline: float | None = None) -> list[float]:
    """(r - b) / std, or r - b; zeros where all are right or all are wrong."""
    rewards = [rollout.reward for rollout in group]
    if all(r > 0.5 for r in rewards) or not any(r > 0.5 for r in rewards):
        return [0.0] * len(group)
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    b = mean if baseline is None else baseline
    return [(r - b) / std if normalized else r - b for r in rewards]


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def dual(value: float, a: float, c: float) -> float:
    """PPO dual clip of an objective's value: never below c A for A < 0."""
    return max(value, c * a) if c and a < 0 else value


def ppo(rho: float, a: float, low: float, high: float, c: float) -> float:
    return dual(min(rho * a, clip(rho, 1 - low, 1 + high) * a), a, c)


def token_ppo(new, old, weights, a: float, low: float, high: float, c: float) -> float:
    return sum(w * ppo(math.exp(n - o), a, low, high, c) for n, o, w in zip(new, old, weights, strict=True))


def grpo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, o, w, a in zip(new, old, weights, advantage, strict=True):
        total += token_ppo(n, o, w, a, 0.2, 0.2, c) / len(n)
    return -total / len(new)


def dr_grpo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, o, w, a in zip(new, old, weights, advantage, strict=True):
        total += token_ppo(n, o, w, a, 0.2, 0.2, c) / max_length
    return -total / len(new)


def dapo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, o, w, a in zip(new, old, weights, advantage, strict=True):
        total += token_ppo(n, o, w, a, 0.2, 0.28, c)
    return -total / sum(len(n) for n in new)


def gspo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, o, w, a in zip(new, old, weights, advantage, strict=True):
        likelihood_ratio = math.exp(sum(n)) / math.exp(sum(o))
        total += sum(w) / len(w) * ppo(likelihood_ratio ** (1 / len(n)), a, 3e-4, 4e-4, c)
    return -total / len(new)


def gmpo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, o, w, a in zip(new, old, weights, advantage, strict=True):
        sign = 1 if a > 0 else -1
        product = 1.0
        for n_t, o_t in zip(n, o, strict=True):
            signed = math.exp(n_t - o_t) ** sign
            product *= min(signed, clip(signed, math.exp(-0.4), math.exp(0.4))) ** sign
        total += sum(w) / len(w) * dual(product ** (1 / len(n)) * a, a, c)
    return -total / len(new)


def aspo_token(new: float, frozen: float, old: float, a: float, c: float) -> float:
    rho = math.exp(new - old)
    if (a < 0 and rho < 0.8) or (a > 0 and rho > 1.2):
        return 0.0
    if a <= 0:
        return dual(rho * a, a, c)
    flipped = math.exp(old) * math.exp(new) / math.exp(frozen) ** 2
    value = math.exp(old) / math.exp(frozen)
    return min(value, c) * (flipped / value) * a


def aspo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, f, o, w, a in zip(new, frozen, old, weights, advantage, strict=True):
        for n_t, f_t, o_t, w_t in zip(n, f, o, w, strict=True):
            total += w_t * aspo_token(n_t, f_t, o_t, a, c)
    return -total / sum(len(n) for n in new)


def cispo(new, frozen, old, weights, advantage, max_length, c):
    total = 0.0
    for n, f, o, w, a in zip(new, frozen, old, weights, advantage, strict=True):
        for n_t, f_t, o_t, w_t in zip(n, f, o, w, strict=True):
            bounded = clip(math.exp(f_t - o_t), 0.0, 5.0)
            total += w_t * (min(bounded, c) if c and a < 0 else bounded) * a * n_t
    return -total / sum(len(n) for n in new)


LOSSES = {f.__name__: f for f in (grpo, dr_grpo, dapo, gspo, gmpo, aspo, cispo)}


@dataclass
class Correction:
    """A correction by its name in the settings, its bounds and its veto; 0 is no veto."""

    name: str
    low: float
    high: float
    veto: float = 0.0


def correction_weights(old: list[float], engine: list[float], correction: Correction | None) -> list[float]:
    """The weights of one response's tokens; None: ones."""
    if correction is None:
        return [1.0] * len(old)
    ratios = [math.exp(o - e) for o, e in zip(old, engine, strict=True)]
    if any(ratio < correction.veto for ratio in ratios):
        return [0.0] * len(ratios)
    product = math.prod(ratios)
    mean = product ** (1 / len(ratios))
    low, high = correction.low, correction.high
    if correction.name == "token_tis":
        return [clip(ratio, low, high) for ratio in ratios]
    if correction.name == "sequence_tis":
        return [clip(product, low, high)] * len(ratios)
    if correction.name == "token_mask":
        return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]
    if correction.name == "sequence_mask":
        return [product if low <= product <= high else 0.0] * len(ratios)
    assert correction.name == "geometric_mask"
    return [1.0 if low <= mean <= high else 0.0] * len(ratios)


def first_order_baseline(rewards: list[float], delta: list[float]) -> float:
    mean = sum(rewards) / len(rewards)
    delta_mean = sum(delta) / len(delta)
    products = [(r - mean) * (d - delta_mean) for r, d in zip(rewards, delta, strict=True)]
    return mean + 2 * sum(products) / len(products)


def exact_baseline(rewards: list[float], delta: list[float]) -> float:
    weights = [math.exp(d) ** 2 for d in delta]
    return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)


def loss(
    preset: str,
    groups: list[Group],
    new,
    baselines,
    max_length: int,
    c: float,
    correction: Correction | None = None,
) -> float:
    """The step's loss with `new` in place of the rollouts' own new log-probs (which stay the frozen ones)."""
    normalized = preset != "dr_grpo"
    advantage = [a for g, b in zip(groups, baselines, strict=True) for a in advantages(g, normalized, b)]
    rollouts = [rollout for group in groups for rollout in group]
    frozen, old = [r.new for r in rollouts], [r.old for r in rollouts]
    weights = [correction_weights(r.old, r.engine, correction) for r in rollouts]
    return LOSSES[preset](new, frozen, old, weights, advantage, max_length, c)


def gradient(preset, groups, baselines, max_length, c, step: float, correction=None) -> list[float]:
    """Central finite differences of `loss` in every token's log-prob, flat."""
    result = []
    new = [list(rollout.new) for group in groups for rollout in group]
    for tokens in new:
        for index, value in enumerate(tokens):
            sides = []
            for shifted in (value + step, value - step):
                tokens[index] = shifted
                sides.append(loss(preset, groups, new, baselines, max_length, c, correction))
            tokens[index] = value
            result.append((sides[0] - sides[1]) / (2 * step))
    return result
