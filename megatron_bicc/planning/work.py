"""Counts a step's FLOPs and the bytes that it sends, from the micro-batches of a packed synthetic step.

A product of [a, b] by [b, c] counts 2abc FLOPs. Bytes are what one rank sends.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bicc.algorithms.advantages import needs_reference
from megatron_bicc.config import Config
from megatron_bicc.packing.plan import StepPlan
from megatron_bicc.packing.types import MicroBatchLayout
from megatron_bicc.planning.memory import Sizes, element_bytes
from megatron_bicc.planning.shards import Shard
from megatron_bicc.planning.synthetic import SyntheticStep


@dataclass(frozen=True)
class Load:
    """Size of the micro-batches on the data-parallel rank with the most work."""

    micro_batches: int
    rows: int
    response_rows: int
    pairs: int
    """Query-key pairs per attention head"""

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.micro_batches + other.micro_batches,
            self.rows + other.rows,
            self.response_rows + other.response_rows,
            self.pairs + other.pairs,
        )

    def times(self, passes: int) -> "Load":
        """Returns the load of that many passes."""
        return Load(
            passes * self.micro_batches,
            passes * self.rows,
            passes * self.response_rows,
            passes * self.pairs,
        )


NOTHING = Load(0, 0, 0, 0)


def load_of(plan: StepPlan) -> Load:
    """Returns the load of the rank with the highest cost by the packer's measure, pairs and rows."""
    ranks = [sum((_count(batch) for batch in rank), NOTHING) for rank in plan.ranks]
    return max(ranks, key=lambda r: r.pairs + plan.settings.token_cost * r.rows)


def _count(batch: MicroBatchLayout) -> Load:
    causal = np.diff(batch.cu_seqlens).astype(np.int64)
    cross = np.diff(batch.cu_prefix).astype(np.int64) * np.diff(batch.cu_response_side)
    pairs = (causal * (causal + 1) // 2).sum() + cross.sum()
    return Load(1, batch.num_rows, batch.num_response_rows, int(pairs))


@dataclass(frozen=True)
class Work:
    """The passes of a step."""

    forward: Load
    """Passes without gradients: old and reference log-probs"""
    train: Load


def work_of(step: SyntheticStep, config: Config) -> Work:
    """Returns the passes that the learner runs."""
    forward = train = NOTHING
    conditioned = config.bicc.denominator == "conditioned"
    for number, update in enumerate(step.updates):
        passes = 2 if needs_reference(config) else 1
        forward += load_of(update.log_probs).times(passes)
        for layout, plan in update.trained.items():
            train += load_of(plan)
            # before a step's first update the policy is the old policy: its ratio is 1 without a pass
            if layout == "bilateral" and conditioned and number > 0:
                forward += load_of(plan)
    return Work(forward, train)


def forward_flops(sizes: Sizes, rows: Load) -> int:
    """Returns FLOPs of the whole policy's forward pass: products, attention over the pairs, and logits."""
    products = 2 * sizes.layers * sizes.products_a_layer * rows.rows
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * rows.pairs
    return products + attention + 2 * sizes.hidden * sizes.vocabulary * rows.response_rows


def step_flops(sizes: Sizes, config: Config, work: Work) -> int:
    """Returns FLOPs of a data-parallel replica: backward counts as two forwards, full recompute as one."""
    passes = 4 if config.model.recompute == "full" else 3
    return forward_flops(sizes, work.forward) + passes * forward_flops(sizes, work.train)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends per step."""

    tensor: int
    pipeline: int
    data: int
    expert: int
    sync: int
    """Of all ranks together: the whole policy to the rollout servers"""


def traffic_of(
    sizes: Sizes, config: Config, work: Work, shard: Shard, data_parallel: int, updates: int
) -> Traffic:
    """Returns the traffic of a rank. Ring collectives over n ranks send (n - 1) / n of a tensor."""
    p, element = config.parallel, element_bytes(config)
    layers = sizes.layers // p.pipeline
    row = element * sizes.hidden
    # Forward: attention and MLP each gather and scatter, or all-reduce, which sends as much: 4. Backward: the
    # same, and under sequence parallel another gather of each: 4 or 6. Full recompute repeats forward: 4.
    backward = (6 if p.sequence else 4) + (4 if config.model.recompute == "full" else 0)
    tensor = (
        layers * row * (4 * work.forward.rows + (4 + backward) * work.train.rows) * (p.tensor - 1) // p.tensor
    )
    shares = p.tensor if p.sequence else 1
    sends = 0 if p.pipeline == 1 else p.virtual_pipeline
    pipeline = sends * row // shares * (work.forward.rows + 2 * work.train.rows)
    own = shard.gradient_bytes + shard.weight_bytes
    data = updates * own * (data_parallel - 1) // data_parallel
    expert = 0
    if p.expert > 1:
        routed = sizes.experts_a_token * (work.forward.rows + 2 * work.train.rows) // shares
        expert = 2 * layers * row * routed * (p.expert - 1) // p.expert
    return Traffic(tensor, pipeline, data, expert, sync=element * sizes.parameters)
