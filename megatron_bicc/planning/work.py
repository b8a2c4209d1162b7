"""FLOPs and bytes that a step moves, from the micro-batches of a packed synthetic step.

A product of [a, b] by [b, c] is 2abc FLOPs. Bytes are those that one rank sends.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bicc.algorithms.advantages import needs_reference
from megatron_bicc.config import Config
from megatron_bicc.packing.plan import StepPlan
from megatron_bicc.packing.types import MicroBatchLayout
from megatron_bicc.planning.memory import Sizes
from megatron_bicc.planning.shards import Shard
from megatron_bicc.planning.synthetic import SyntheticStep


@dataclass(frozen=True)
class Rows:
    """What micro-batches hold, on the data-parallel rank that has most to do."""

    micro_batches: int
    rows: int
    response_rows: int
    pairs: int
    """Query-key pairs of one attention head"""

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(
            self.micro_batches + other.micro_batches,
            self.rows + other.rows,
            self.response_rows + other.response_rows,
            self.pairs + other.pairs,
        )

    def times(self, passes: int) -> "Rows":
        """So many passes over them."""
        return Rows(
            passes * self.micro_batches,
            passes * self.rows,
            passes * self.response_rows,
            passes * self.pairs,
        )


NOTHING = Rows(0, 0, 0, 0)


def rows_of(plan: StepPlan) -> Rows:
    """Of the costliest rank, by pairs and rows."""
    ranks = [sum((_count(batch) for batch in rank), NOTHING) for rank in plan.ranks]
    return max(ranks, key=lambda r: r.pairs + plan.settings.token_cost * r.rows)


def _count(batch: MicroBatchLayout) -> Rows:
    causal = np.diff(batch.cu_seqlens).astype(np.int64)
    cross = np.diff(batch.cu_prefix).astype(np.int64) * np.diff(batch.cu_response_side)
    pairs = (causal * (causal + 1) // 2).sum() + cross.sum()
    return Rows(1, batch.num_rows, batch.num_response_rows, int(pairs))


@dataclass(frozen=True)
class Work:
    """A step's passes."""

    forward: Rows
    """Passes without gradients: old and reference log-probs"""
    train: Rows


def work_of(step: SyntheticStep, config: Config) -> Work:
    """The passes that the learner makes."""
    forward = train = NOTHING
    conditioned = config.bicc.denominator == "conditioned"
    for number, update in enumerate(step.updates):
        passes = 2 if needs_reference(config) else 1
        forward += rows_of(update.plain).times(passes)
        for given_context, plan in update.trained.items():
            train += rows_of(plan)
            # before its first update the policy is its own old one
            if given_context and conditioned and number > 0:
                forward += rows_of(plan)
    return Work(forward, train)


def forward_flops(sizes: Sizes, rows: Rows) -> int:
    """Of the whole policy: matrix products, attention over the pairs that are looked at, and logits."""
    products = 2 * sizes.layers * sizes.products_a_layer * rows.rows
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * rows.pairs
    return products + attention + 2 * sizes.hidden * sizes.vocabulary * rows.response_rows


def step_flops(sizes: Sizes, config: Config, work: Work) -> int:
    """Of a data-parallel replica: backward is twice forward; full recompute adds a forward pass."""
    passes = 4 if config.model.recompute == "full" else 3
    return forward_flops(sizes, work.forward) + passes * forward_flops(sizes, work.train)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    tensor: int
    pipeline: int
    data: int
    expert: int
    sync: int
    """All ranks together: the whole policy to the rollout servers"""


def traffic_of(
    sizes: Sizes, config: Config, work: Work, shard: Shard, data_parallel: int, updates: int
) -> Traffic:
    """Of a rank with a full share of layers. Ring collectives send (n - 1) / n of a tensor on n ranks."""
    p, element = config.parallel, 4 if config.model.dtype == "float32" else 2
    layers = sizes.layers // p.pipeline
    row = element * sizes.hidden
    # forward: attention and MLP each gather and scatter, or all-reduce; backward as much and a third gather
    # of each under sequence parallel; full recompute forward again
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
