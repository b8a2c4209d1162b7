"""Whether rollout engine and policy compute one model, by the log-probs of what the engine sampled.

Before a step's first update the policy has the weights that the engine sampled with, so only rounding may
differ. kl/rollout_old is the mean over tokens of k3 = pi / mu - 1 - log(pi / mu), with mu the engine's and pi
the policy's probability of a token.

Shape suffixes: T tokens of all responses of a step.

The numbers of a step, under the names that docs/metrics.md explains.

Shape suffixes: R rollouts, T tokens of all responses.

A few groups of a step in words, for the report: each response with the context it was trained under.

How a step's groups became micro-batches, for the report.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import Advantages, TokenLogProbs, overlong_penalty
from megatron_bicc.algorithms.segments import spread
from megatron_bicc.algorithms.statistics import (
    StepTokens,
    contrast_statistics,
    engine_statistics,
    ratio_statistics,
)
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import LayoutRecord, MicroBatchRecord, PlanRecord
from megatron_bicc.packing.plan import StepPlan, packed_sides
from megatron_bicc.packing.types import MicroBatch
from megatron_bicc.rollout.sampling import Collected
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.batch import step_batch
from megatron_bicc.training.learner import StepResult

logger = logging.getLogger(__name__)


class EngineMismatch(UserError):
    """Rollout engine and policy compute different models: one line that says what to compare."""


@dataclass(frozen=True)
class Bounds:
    """What rounding explains at temperature 1; kl/rollout_old grows as the square of the differences."""

    warn: float
    """Of kl/rollout_old: more is far over what rounding makes"""
    stop: float
    """Of kl/rollout_old: more is impossible for rounding, unless single tokens make it"""
    weight: float
    """Of pi / mu and its inverse: where over 1 % of the tokens are beyond, it is not single ones"""


FP32 = Bounds(warn=1e-5, stop=1e-2, weight=1.1)
"""Differences of 1e-4 (weight_sync.probe), of which kl/rollout_old is 5e-9, are already large"""
BITS_16 = Bounds(warn=1e-2, stop=0.5, weight=2.0)
"""Healthy is 1e-3; 24 random layers reached differences of 0.2 (docs/weight_sync.md), about 1e-2"""
BITS_16_EXPERTS = Bounds(warn=0.1, stop=0.5, weight=2.0)
"""Rounding makes a router choose another expert for a token now and then: differences up to 1.33 were seen"""


def bounds_of(config: Config, experts: bool) -> Bounds:
    """Those of the coarser of the policy's and the engine's types, at the sampling temperature."""
    rollout = config.rollout
    coarse = any(word in rollout.sglang.server_args for word in ("quant", "kv-cache-dtype"))
    # of an attached server the type is not known
    known = rollout.engine == "local" or (rollout.launch == "spawn" and not coarse)
    plain = BITS_16_EXPERTS if experts else BITS_16
    bounds = FP32 if config.model.dtype == "float32" and known else plain
    # errors of logits are divided by the temperature
    scale = max(1.0, 1.0 / rollout.temperature)
    return Bounds(bounds.warn * scale**2, bounds.stop * scale**2, bounds.weight**scale)


class MismatchCheck:
    """Looks at each step of a run; keeps whether it has warned."""

    def __init__(self, config: Config, experts: bool) -> None:
        """experts: whether the policy has any."""
        self.bounds = bounds_of(config, experts)
        self.dtype = config.model.dtype
        self._first = True
        self._over = False

    def step(self, step: int, log_probs: list[TokenLogProbs]) -> None:
        """Looks at a step before its first update; the same on every process.

        log_probs: of rollouts that the engine sampled with the policy's present weights. Warns in one line,
        on the first process, where kl/rollout_old is over the bound and was not at the step before. Raises
        EngineMismatch at the first step that is looked at, where rounding cannot make it.
        """
        if not log_probs:
            return
        old_T, rollout_T = (
            np.concatenate([getattr(x, n) for x in log_probs]) for n in ("old_T", "rollout_T")
        )
        found, bounds = engine_statistics(old_T, rollout_T), self.bounds
        kl, largest = found["kl/rollout_old"], found["tis/max"]
        first, was_over, self._first, self._over = self._first, self._over, False, kl > bounds.warn
        line = (
            f"step {step}: rollout engine and policy differ: kl/rollout_old is {kl:.2g} where {self.dtype} "
            f"makes less than {bounds.warn:.2g}, the largest weight policy / engine is {largest:.3g}"
        )
        many = found["tis/q99"] > bounds.weight or found["tis/q01"] < 1 / bounds.weight
        if first and many and kl > bounds.stop:
            raise EngineMismatch(
                f"{line}; they compute different models: compare config.json and the servers' arguments "
                "with docs/policy.md"
            )
        if self._over and not was_over and device.is_first():
            logger.warning("%s (docs/scaling.md)", line)


def rollout_metrics(collected: Collected, config: Config) -> dict[str, float]:
    """Of all rollouts that a step sampled: rewards, lengths, contrast."""
    groups = collected.sampled
    batch = step_batch(groups)
    rewards_R = batch.rollouts.rewards_R
    correct_R = rewards_R > config.reward.threshold
    penalty_R = overlong_penalty(batch.lengths_R, config.rollout.max_new_tokens, config.reward)
    truncated = [s.finish_reason == "length" for group in groups for s in group.samples]
    return {
        "reward/mean": float(rewards_R.mean()),
        "reward/pass_rate": float(correct_R.mean()),
        "reward/overlong_penalty": float(penalty_R.mean()),
        "rollout/length_mean": float(batch.lengths_R.mean()),
        "rollout/length_max": float(batch.lengths_R.max()),
        "rollout/truncated": float(np.mean(truncated)),
        "rollout/prompts": len(groups),
        "rollout/carried": collected.carried,
        "rollout/leftover": collected.leftover,
        "rollout/aborted": collected.aborted,
    } | contrast_statistics(correct_R, batch.rollouts.group_offsets_B)


def update_metrics(result: StepResult, config: Config) -> dict[str, float]:
    """Of one optimiser step: loss, gradient, baselines, ratios by side, tokens."""
    adv, plans = result.advantages, result.plans.values()
    packed, rows, context = (
        float(sum(plan.stats[f"tokens_{name}"] for plan in plans)) for name in ("packed", "rows", "context")
    )
    return (
        {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/entropy": float(result.log_probs.entropy_T.mean()),
            "tokens/packed": packed,
            "tokens/rows": rows,
            "tokens/saved": rows - packed,
            "tokens/context": context,
        }
        | _baselines(adv)
        | result.gradient
        | _ratios(result, config)
    )


def _baselines(adv: Advantages) -> dict[str, float]:
    """Of the groups with contrast; nothing of none."""
    if not adv.contrast_G.any():
        return {}
    shift_G = adv.baseline_G - adv.mean_G
    return {
        "rcc/cov": float(adv.covariance_G[adv.contrast_G].mean()),
        "rcc/baseline_shift": float(shift_G[adv.contrast_G].mean()),
    }


def _ratios(result: StepResult, config: Config) -> dict[str, float]:
    """Of the ratios as trained: given a context where BICC trains with one, else given the prompt alone."""
    conditioned = True in result.ratios
    ratio, rollouts = result.ratios[conditioned], result.batch.rollouts
    tokens = StepTokens(
        old_logp_T=ratio.old_T,
        new_logp_T=ratio.new_T,
        offsets_R=rollouts.offsets_R,
        advantage_R=result.advantages.advantage_R,
        correct_R=rollouts.rewards_R > config.reward.threshold,
        ref_logp_T=result.log_probs.ref_T,
        rollout_logp_T=result.log_probs.rollout_T,
        plain_logp_T=result.log_probs.old_T,
        contrast_R=spread(result.advantages.contrast_G, rollouts.group_offsets_B),
    )
    return ratio_statistics(tokens, config.loss)


def mean_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the optimiser steps of a batch of rollouts; token counts are summed."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {
        name: float(np.sum(v) if name.startswith("tokens/") else np.mean(v)) for name, v in values.items()
    }


def report_groups(
    result: StepResult, groups: list[Group], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[dict[str, Any]]:
    """The first monitoring.report_groups groups with contrast, as docs/metrics.md describes groups.jsonl.

    Then the first group that was all right and the first that was all wrong, which have no advantage.
    `groups` are those given to the optimiser step, without contrast included.
    """
    right_shares = [float((group.rewards > config.reward.threshold).mean()) for group in groups]
    plan, shown = result.plans.get(True), []
    offsets_G = result.batch.rollouts.group_offsets_B
    with_contrast = np.flatnonzero(result.advantages.contrast_G)
    for place in with_contrast[: config.monitoring.report_groups]:
        group, members = groups[result.taken[place]], range(*offsets_G[place : place + 2])
        advantages = result.advantages.advantage_R[members].tolist()
        contexts = [_context(plan, i, len(group.prompt.token_ids), tokenizer) for i in members]
        shown.append(_describe(group, advantages, contexts, config))
    without_contrast = [groups[right_shares.index(share)] for share in (1.0, 0.0) if share in right_shares]
    if config.monitoring.report_groups:
        for group in without_contrast:
            shown.append(_describe(group, [0.0] * len(group.samples), [""] * len(group.samples), config))
    return shown


def _describe(group: Group, advantages: list[float], contexts: list[str], config: Config) -> dict[str, Any]:
    return {
        "prompt": "\n".join(message["content"] for message in group.prompt.messages),
        "ground_truth": group.prompt.ground_truth,
        "rollouts": [
            {
                "text": text,
                "reward": float(reward),
                "advantage": advantage,
                "correct": bool(reward > config.reward.threshold),
                "context": context,
            }
            for text, reward, advantage, context in zip(
                group.texts, group.rewards, advantages, contexts, strict=True
            )
        ],
    }


def _context(
    plan: StepPlan | None, rollout: int, prompt_length: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """What stood between prompt and response; empty without BICC. The first of several contexts."""
    contexts = plan.contexts(rollout) if plan else []
    return tokenizer.decode(contexts[0].prefix_tokens[prompt_length:]) if contexts else ""


def report_layout(result: StepResult, config: Config) -> LayoutRecord:
    """The rows of every micro-batch of all ranks, as docs/metrics.md describes layout.jsonl."""
    correct_R = result.batch.rollouts.rewards_R > config.reward.threshold
    plans: list[PlanRecord] = [
        {"context": context, "ranks": [[_describe_layout(b, correct_R) for b in rank] for rank in plan.ranks]}
        for context, plan in result.plans.items()
    ]
    return {"budget": config.train.max_tokens_per_microbatch, "plans": plans}


def _describe_layout(micro_batch: MicroBatch, correct_R: np.ndarray) -> MicroBatchRecord:
    used = micro_batch.num_prefix_rows + micro_batch.num_response_rows
    return {
        "padding": len(micro_batch.tokens_T) - used,
        "sides": [
            {
                "group": side.group,
                "prefix": side.prefix_rows,
                "responses": list(side.response_rows),
                "correct": [bool(correct_R[rollout]) for rollout in side.rollouts],
            }
            for side in packed_sides(micro_batch)
        ],
    }
