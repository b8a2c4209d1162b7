"""A few groups of a step in words, for the report: each response with the context it was trained under."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_bicc.config import Config
from megatron_bicc.packing import StepPlan
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.learner import StepResult


def report_groups(
    result: StepResult, groups: list[Group], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[dict[str, Any]]:
    """The first monitoring.report_groups groups with contrast, as docs/metrics.md describes groups.jsonl.

    Then the first group that was all right and the first that was all wrong, which have no advantage.
    `groups` are those given to the optimiser step, without contrast included.
    """
    right_shares = [float((group.rewards > config.reward.threshold).mean()) for group in groups]
    plan, shown = result.plans.get(True), []
    offsets_G = result.batch.rollouts.group_offsets_G
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
