"""The numbers of a step, under the names that docs/metrics.md explains.

Shape suffixes: R rollouts, T tokens of all responses.
"""

import numpy as np

from megatron_bicc.algorithms.segments import spread
from megatron_bicc.algorithms.shaping import overlong_penalty
from megatron_bicc.algorithms.statistics import StepTokens, contrast_statistics, ratio_statistics
from megatron_bicc.config import Config
from megatron_bicc.evaluation import Evaluation
from megatron_bicc.rollout.dynamic import Collected
from megatron_bicc.training.batch import step_batch
from megatron_bicc.training.learner import StepResult
from megatron_bicc.training.weighing import Advantages


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
    } | contrast_statistics(correct_R, batch.rollouts.group_offsets_G)


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
        contrast_R=spread(result.advantages.contrast_G, rollouts.group_offsets_G),
    )
    return ratio_statistics(tokens, config.loss)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Of an evaluation on held-out prompts; avg@k is the unbiased pass@1."""
    return {
        "eval/pass_at_1_stderr": evaluation.avg.standard_error,
        "eval/truncated": evaluation.truncated,
        "eval/length_mean": evaluation.length,
    } | {f"eval/pass_at_{k}": estimate.value for k, estimate in evaluation.pass_at.items()}


def mean_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the optimiser steps of a batch of rollouts; token counts are summed."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {
        name: float(np.sum(v) if name.startswith("tokens/") else np.mean(v)) for name, v in values.items()
    }
