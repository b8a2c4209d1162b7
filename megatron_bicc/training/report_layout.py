"""How a step's groups became micro-batches, for the report."""

import numpy as np

from megatron_bicc.config import Config
from megatron_bicc.monitoring.writer import LayoutRecord, MicroBatchRecord, PlanRecord
from megatron_bicc.packing import packed_sides
from megatron_bicc.packing.types import MicroBatch
from megatron_bicc.training.learner import StepResult


def report_layout(result: StepResult, config: Config) -> LayoutRecord:
    """The rows of every micro-batch of all ranks, as docs/metrics.md describes layout.jsonl."""
    correct_R = result.batch.rollouts.rewards_R > config.reward.threshold
    plans: list[PlanRecord] = [
        {"context": context, "ranks": [[_describe(b, correct_R) for b in rank] for rank in plan.ranks]}
        for context, plan in result.plans.items()
    ]
    return {"budget": config.train.max_tokens_per_microbatch, "plans": plans}


def _describe(micro_batch: MicroBatch, correct_R: np.ndarray) -> MicroBatchRecord:
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
