"""Replays the experts that a router chose in an earlier pass (model.routing_replay), by megatron-core's seam.

Shape suffixes: N rows of a micro-batch. L and K in text: layers of this rank; experts per token.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from megatron_bicc.model.families import free_mark
from megatron_bicc.model.moe_router import RecomputedValue

TopK = Callable[..., tuple[Tensor, Tensor]]


class RowReplay(RouterReplay):
    """Replays a router's experts row by row: a row without any is routed by its own scores.

    megatron-core's class replays all rows of a call, and is told by a global action whether a call is a
    forward pass or a recomputation in a backward pass. Under pipeline parallel both are interleaved.
    """

    def __init__(self) -> None:
        """Nothing is replayed until `start`."""
        super().__init__()
        self._experts = RecomputedValue[Tensor]()

    def start(self, experts: Tensor | None, record: bool) -> None:
        """Sets what the next forward pass replays: [N, K], `free_mark` in rows that the router decides.

        experts: None if it decides all. record: keep the experts of the pass in `recorded_topk_idx`.
        """
        self._experts.set(experts)
        self.router_replay_action = RouterReplayAction.RECORD if record else None

    def clear_indices(self) -> None:
        """Drops what was replayed and recorded."""
        super().clear_indices()
        self._experts.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns scores [N, K] and numbers [N, K] of each row's experts; megatron-core's router calls it."""
        given = self._experts.read()
        values, chosen = default_compute_topk(scores, topk, num_groups, group_topk)
        if given is not None:
            chosen = torch.where(given == free_mark(given.dtype), chosen, given.long())
            values = scores.gather(1, chosen)
        if self.router_replay_action is RouterReplayAction.RECORD:
            self.record_indices(chosen)
        return values, chosen
