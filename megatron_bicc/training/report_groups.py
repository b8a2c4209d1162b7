"""A few groups of a step in words, for the report: each response with the context it was trained under."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_bicc.config import Config
from megatron_bicc.packing import StepPlan
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.learner import StepResult


def report_groups(
    result: StepResult, groups: list[Group], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[dict[str, Any]]:
    """The first monitoring.report_groups trained groups, as docs/metrics.md describes groups.jsonl.

    `groups` are those given to the optimiser step, without contrast included.
    """
    correct = [group.rewards > config.reward.threshold for group in groups]
    trained = [group for group, right in zip(groups, correct, strict=True) if 0 < right.sum() < len(right)]
    plan = result.plans.get(True)
    described, first = [], 0
    for group in trained[: config.monitoring.report_groups]:
        described.append(_describe(group, first, result, plan, tokenizer, config))
        first += len(group.samples)
    return described


def _describe(
    group: Group,
    first: int,
    result: StepResult,
    plan: StepPlan | None,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> dict[str, Any]:
    """`first` is the index of the group's first rollout among the trained ones."""
    return {
        "prompt": "\n".join(message["content"] for message in group.prompt.messages),
        "ground_truth": group.prompt.ground_truth,
        "rollouts": [
            {
                "text": text,
                "reward": float(reward),
                "advantage": float(result.advantages.advantage_R[first + i]),
                "correct": bool(reward > config.reward.threshold),
                "context": _context(plan, first + i, len(group.prompt.token_ids), tokenizer),
            }
            for i, (text, reward) in enumerate(zip(group.texts, group.rewards, strict=True))
        ],
    }


def _context(
    plan: StepPlan | None, rollout: int, prompt_length: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """What stood between prompt and response; empty without BICC. The first of several contexts."""
    contexts = plan.contexts(rollout) if plan else []
    return tokenizer.decode(contexts[0].prefix_tokens[prompt_length:]) if contexts else ""
