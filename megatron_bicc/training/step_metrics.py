"""Computes a step's metrics (docs/metrics.md) and report records, and checks for engine mismatch.

Before a step's first update the policy has the weights that the engine sampled with, so only rounding may
differ. kl/rollout_old is the mean over tokens of k3 = pi / mu - 1 - log(pi / mu), with mu the engine's and pi
the policy's probability of a token.

Shape suffixes: B groups, R rollouts, T response tokens of a step.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import TokenLogProbs, overlong_penalty
from megatron_bicc.algorithms.flat_arrays import segment_means, spread
from megatron_bicc.algorithms.statistics import (
    StepTokens,
    contrast_statistics,
    correction_statistics,
    engine_statistics,
    ratio_statistics,
)
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import LayoutRecord, MicroBatchRecord, PlanRecord
from megatron_bicc.model.flops import Sizes, flops_of, peak_flops
from megatron_bicc.packing.types import MicroBatchLayout, StepPlan, packed_sides
from megatron_bicc.rollout.sampling import Collected
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.learner import StepResult, Update

logger = logging.getLogger(__name__)


class EngineMismatch(UserError):
    """Rollout engine and policy compute different models. One line, with what to compare."""


@dataclass(frozen=True)
class Bounds:
    """Mismatch that rounding can cause at temperature 1; kl/rollout_old is quadratic in the differences."""

    warn: float
    """kl/rollout_old above this is far more than rounding usually causes"""
    stop: float
    """kl/rollout_old above this cannot be rounding, except through single tokens"""
    weight: float
    """If pi / mu or its inverse exceeds this for over 1 % of the tokens, it is not single tokens"""


FP32 = Bounds(warn=1e-5, stop=1e-2, weight=1.1)
"""Differences of 1e-4 in log-probs, kl/rollout_old 5e-9, are already large"""
BITS_16 = Bounds(warn=1e-2, stop=0.5, weight=2.0)
"""1e-3 is normal; 24 random layers reached differences of 0.2 (docs/weight_sync.md), about 1e-2"""
BITS_16_EXPERTS = Bounds(warn=0.1, stop=0.5, weight=2.0)
"""Rounding occasionally makes a router choose another expert: differences up to 1.33 were measured"""


def bounds_of(config: Config, experts: bool) -> Bounds:
    """Returns the bounds for the coarser number format, the policy's or the engine's, at the temperature."""
    rollout = config.rollout
    coarse = any(word in rollout.sglang.server_args for word in ("quant", "kv-cache-dtype"))
    # the number format of an attached server is not known
    known = rollout.engine == "local" or (rollout.launch == "spawn" and not coarse)
    plain = BITS_16_EXPERTS if experts else BITS_16
    bounds = FP32 if config.model.dtype == "float32" and known else plain
    # dividing the logits by the temperature divides their errors, too
    scale = max(1.0, 1.0 / rollout.temperature)
    return Bounds(bounds.warn * scale**2, bounds.stop * scale**2, bounds.weight**scale)


class MismatchCheck:
    """Compares engine and policy at each step of a run; warns once per series of mismatches."""

    def __init__(self, config: Config, experts: bool) -> None:
        """experts: whether the policy has experts (mixture of experts)."""
        self.bounds = bounds_of(config, experts)
        self.dtype = config.model.dtype
        self._first = True
        self._over = False

    def step(self, step: int, log_probs: list[TokenLogProbs]) -> None:
        """Checks a step before its first update; the same on every process.

        log_probs: of rollouts that the engine sampled with the policy's current weights, in any number of
        parts; nothing is checked without them. Logs a one-line warning on the first process when
        kl/rollout_old exceeds the bound and did not at the previous step. Raises EngineMismatch at the first
        step checked, if rounding cannot be the cause.
        """
        if not log_probs:
            return
        old_T = np.concatenate([x.old_T for x in log_probs])
        rollout_T = np.concatenate([x.rollout_T for x in log_probs])
        found, bounds = engine_statistics(old_T, rollout_T), self.bounds
        kl, largest = found["kl/rollout_old"], found["correction/ratio/max"]
        first, was_over, self._first, self._over = self._first, self._over, False, kl > bounds.warn
        line = (
            f"step {step}: rollout engine and policy differ: kl/rollout_old is {kl:.2g} where {self.dtype} "
            f"makes less than {bounds.warn:.2g}, the largest weight policy / engine is {largest:.3g}"
        )
        highest, lowest = found["correction/ratio/q99"], found["correction/ratio/q01"]
        many = highest > bounds.weight or lowest < 1 / bounds.weight
        if first and many and kl > bounds.stop:
            raise EngineMismatch(
                f"{line}; they compute different models: compare config.json and the servers' arguments "
                "with docs/policy.md"
            )
        if self._over and not was_over and device.is_first():
            logger.warning("%s (docs/scaling.md)", line)


def current_log_probs(updates: list[Update], version: int) -> list[TokenLogProbs]:
    """Returns the log-probs of the responses that were sampled as a whole by weights of this version.

    version: the newest. A response of several versions is left out with all of its tokens: after a sync by
    rollout.pause=in_place they depend on keys and values of the older weights.
    """
    found = []
    for update in updates:
        offsets_R, log_probs = update.batch.rollouts.offsets_R, update.log_probs
        # versions never fall within a response
        at_T = spread(update.batch.versions_T[offsets_R[:-1]] == version, offsets_R)
        if at_T.any():
            old_T, rollout_T, entropy_T = log_probs.old_T, log_probs.rollout_T, log_probs.entropy_T
            found.append(TokenLogProbs(old_T[at_T], None, rollout_T[at_T], entropy_T[at_T]))
    return found


def rollout_metrics(collected: Collected, config: Config) -> dict[str, float]:
    """Returns rewards, lengths and contrast of all rollouts that a step sampled, trained on or not."""
    groups = collected.sampled
    rewards_R = np.concatenate([group.rewards for group in groups])
    samples = [sample for group in groups for sample in group.samples]
    lengths_R = np.array([len(sample.token_ids) for sample in samples])
    correct_R = rewards_R > config.reward.threshold
    penalty_R = overlong_penalty(lengths_R, config.rollout.max_new_tokens, config.reward)
    return {
        "reward/mean": float(rewards_R.mean()),
        "reward/pass_rate": float(correct_R.mean()),
        "reward/overlong_penalty": float(penalty_R.mean()),
        "rollout/length_mean": float(lengths_R.mean()),
        "rollout/length_max": float(lengths_R.max()),
        "rollout/truncated": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "rollout/prompts": len(groups),
        "rollout/carried": collected.carried,
        "rollout/leftover": collected.leftover,
        "rollout/aborted": collected.aborted,
        **(_queue_metrics(collected, config) if collected.queue else {}),
    } | contrast_statistics(correct_R, np.cumsum([0, *(len(group.samples) for group in groups)]))


def _queue_metrics(collected: Collected, config: Config) -> dict[str, float]:
    """Returns the metrics of an asynchronous run's step."""
    queue, trained = collected.queue, [sample for group in collected.groups for sample in group.samples]
    ages = np.bincount(queue.staleness, minlength=config.rollout.max_staleness + 1)
    mixed = [s.versions is not None and len(set(s.versions.tolist())) > 1 for s in trained]
    return {
        "rollout/staleness_mean": float(np.mean(queue.staleness)),
        "rollout/staleness_max": max(queue.staleness),
        **{f"rollout/staleness_{age}": share for age, share in enumerate((ages / ages.sum()).tolist())},
        "rollout/mixed_versions": float(np.mean(mixed)),
        "rollout/in_flight": queue.in_flight,
        "rollout/dropped_stale": queue.dropped_stale,
        "rollout/dropped_no_contrast": queue.dropped_no_contrast,
    }


def gpu_metrics(
    results: list[StepResult], seconds: float, hf_config: PretrainedConfig, config: Config
) -> dict[str, float]:
    """Returns peak memory, utilization and speed of a step on GPUs; nothing on a CPU. Collective.

    seconds: of the step's passes and updates. A GPU without a known peak, and fp32, have no perf/mfu.
    """
    gpu = device.gpu_name()
    if not gpu:
        return {}
    found = {"memory/peak_gb": max(gathered(device.take_peak_bytes())) / 1e9}
    trained = [each.plan for result in results for each in result.trained]
    if trained:
        gpu_seconds = seconds * dist.get_world_size()
        found["perf/rows_per_gpu_second"] = sum(p.stats["tokens_packed"] for p in trained) / gpu_seconds
        sizes, peak = Sizes.of(hf_config), peak_flops(gpu)
        if peak and config.model.dtype == "bfloat16":
            flops = sum(flops_of(sizes, plan) for result in results for plan in result.passes)
            # backward is two products for each of forward; what recomputation repeats does not count
            flops += 3 * sum(flops_of(sizes, plan) for plan in trained)
            found["perf/mfu"] = flops / (gpu_seconds * peak)
    return found


def update_metrics(result: StepResult, config: Config, version: int) -> dict[str, float]:
    """Returns loss, gradient, baselines, ratios by side and token counts of one optimizer step.

    version: of the old policy's weights, from which the staleness of the rollouts is counted.
    """
    stats = [trained.plan.stats for trained in result.trained]
    packed, rows, context = (
        float(sum(s[f"tokens_{name}"] for s in stats)) for name in ("packed", "rows", "context")
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
        | _baselines(result)
        | result.gradient
        | result.experts
        | _ratios(result, config)
        | _corrections(result, config, version)
    )


def _baselines(result: StepResult) -> dict[str, float]:
    """Returns the baselines' metrics over groups with contrast; empty without such groups."""
    adv = result.advantages
    if not adv.contrast_B.any():
        return {}
    offsets_B = result.batch.rollouts.group_offsets_B
    shift_B = segment_means(adv.baseline_R - spread(adv.mean_B, offsets_B), offsets_B)
    return {
        "rcc/cov": float(adv.covariance_B[adv.contrast_B].mean()),
        "rcc/baseline_shift": float(shift_B[adv.contrast_B].mean()),
    }


def _ratios(result: StepResult, config: Config) -> dict[str, float]:
    """Returns metrics of the trained ratios: given BICC's context, or the prompt alone without BICC."""
    rollouts = result.batch.rollouts
    tokens = StepTokens(
        ratio=result.trained[0].ratio,  # bilateral first
        offsets_R=rollouts.offsets_R,
        correct_R=rollouts.rewards_R > config.reward.threshold,
        contrast_R=spread(result.advantages.contrast_B, rollouts.group_offsets_B),
        plain_logp_T=result.log_probs.old_T,
        rollout_logp_T=result.log_probs.rollout_T,
        ref_logp_T=result.log_probs.ref_T,
    )
    return ratio_statistics(tokens)


def _corrections(result: StepResult, config: Config, version: int) -> dict[str, float]:
    """Returns metrics of the loss's correction, if there is one, and of the rollouts by staleness."""
    corrects = config.loss.correction != "none" or config.loss.correction_veto > 0
    return correction_statistics(
        result.log_probs.old_T,
        result.log_probs.rollout_T,
        version - result.batch.versions_T,
        result.corrections if corrects else None,
    )


def mean_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Returns the means over the optimizer steps of a batch of rollouts; token counts are summed."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {
        name: float(np.sum(v) if name.startswith("tokens/") else np.mean(v)) for name, v in values.items()
    }


def report_groups(
    result: StepResult, tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[dict[str, Any]]:
    """Returns the groups of a step for groups.jsonl (docs/metrics.md).

    They are the first monitoring.report_groups groups with contrast, then the first that is all right and the
    first that is all wrong.
    """
    right_shares = [float((group.rewards > config.reward.threshold).mean()) for group in result.groups]
    plan = next((trained.plan for trained in result.trained if trained.layout == "bilateral"), None)
    shown = []
    offsets_B = result.batch.rollouts.group_offsets_B
    with_contrast = np.flatnonzero(result.advantages.contrast_B)
    for place in with_contrast[: config.monitoring.report_groups]:
        group, members = result.groups[result.taken[place]], range(*offsets_B[place : place + 2])
        advantages = result.advantages.advantage_R[members].tolist()
        contexts = [_context(plan, i, len(group.prompt.token_ids), tokenizer) for i in members]
        shown.append(_describe(group, advantages, contexts, config))
    without_contrast = [
        result.groups[right_shares.index(share)] for share in (1.0, 0.0) if share in right_shares
    ]
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
    """Returns the text between prompt and response, of the first context if several; empty without BICC."""
    contexts = plan.contexts(rollout) if plan else []
    return tokenizer.decode(contexts[0].prefix_tokens[prompt_length:]) if contexts else ""


def report_layout(result: StepResult, config: Config) -> LayoutRecord:
    """Returns the micro-batches of all ranks for layout.jsonl (docs/metrics.md)."""
    correct_R = result.batch.rollouts.rewards_R > config.reward.threshold
    plans: list[PlanRecord] = [
        {
            "context": trained.layout == "bilateral",
            "ranks": [[_describe_layout(b, correct_R) for b in rank] for rank in trained.plan.ranks],
        }
        for trained in result.trained
    ]
    budget = config.train.max_tokens_per_microbatch * config.parallel.context
    return {"budget": budget, "plans": plans}


def _describe_layout(micro_batch: MicroBatchLayout, correct_R: np.ndarray) -> MicroBatchRecord:
    used = micro_batch.num_prefix_rows + micro_batch.num_response_rows
    return {
        "padding": micro_batch.num_rows - used,
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
