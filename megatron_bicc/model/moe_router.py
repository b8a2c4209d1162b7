"""The router of a mixture of experts: megatron-core's, with losses and counts over a whole optimizer step.

megatron-core's own losses divide by the tokens of a micro-batch, so that their gradient would depend on the
packing. Here each response row has a weight, and the weights of a step add up to 1 before it is cut. Prefix
rows have none: how often a prefix is repeated depends on the packing.

Shape suffixes: N rows of a micro-batch that this tensor-parallel rank routes, X layers of the whole model, Y
experts of a layer.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

T = TypeVar("T")


class RecomputedValue(Generic[T]):
    """A value of a micro-batch that a layer reads in the forward pass and again in its recomputation.

    Under pipeline parallel, recomputations of earlier micro-batches come between forward passes. Activation
    checkpointing runs the forward pass without gradients and the recomputation with them, and a chunk's
    micro-batches go backward in the order in which they went forward.
    """

    def __init__(self) -> None:
        """The value is None until it is set."""
        self._next: T | None = None
        self._to_recompute = deque[T | None]()

    def set(self, value: T | None) -> None:
        """Sets the value of the micro-batch whose forward pass comes next."""
        self._next = value

    def read(self) -> T | None:
        """Returns the value of this call's micro-batch; the layer calls it once in each pass."""
        if not torch.is_grad_enabled():
            self._to_recompute.append(self._next)
        elif self._to_recompute:
            return self._to_recompute.popleft()
        return self._next

    def clear(self) -> None:
        """Drops all values, at the end of a pass over micro-batches or after an error in it."""
        self._next = None
        self._to_recompute.clear()


@dataclass(frozen=True)
class RouterLosses:
    """The routers' losses of an optimizer step; each layer has both, and layers are added.

    Load balancing: Y sum_y f_y P_y, with f_y the share of all assignments that expert y got and P_y the mean
    of its probability over the rows; 1 if all experts are alike (arXiv 2101.03961, equation 4). f is a
    constant and of the whole step, not of a micro-batch, which would hold every micro-batch to an even load
    (arXiv 2501.11873). z-loss: the mean of logsumexp(logits)^2 (arXiv 2202.08906, equation 5).
    """

    balance: float
    """Coefficient of load balancing"""
    z: float
    """Coefficient of the z-loss"""
    share_XY: Tensor
    """float [X, Y]: f"""
    values_X2: Tensor
    """float64 [X, 2]: load balancing and z-loss without coefficients; the gradient pass adds this rank's part
    of each"""

    @property
    def total(self) -> float:
        """The losses' share of the step's loss, once `values_X2` are summed over ranks."""
        balance, z = self.values_X2.sum(0).tolist()
        return self.balance * balance + self.z * z


class PolicyRouter(TopKRouter):
    """megatron-core's router, which adds losses and counts while a pass over micro-batches asks for them."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        """config, pg_collection: as megatron-core passes them."""
        super().__init__(config, pg_collection)
        self.load_XY: Tensor | None = None
        """float64: assignments to each expert, by weight; set while passes are counted"""
        self.losses: RouterLosses | None = None
        """Set during a gradient pass with losses"""
        self.weight_N = RecomputedValue[Tensor]()
        """float32: the weights of a micro-batch's rows, while `active`"""

    @property
    def active(self) -> bool:
        """Whether the next pass needs the rows' weights."""
        return self.load_XY is not None or self.losses is not None

    def finish(self) -> None:
        """Ends counting and losses, at the end of a pass or after an error in it."""
        self.load_XY = self.losses = None
        self.weight_N.clear()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns probabilities [N, Y] and the map of assignments, bool [N, Y]; megatron-core calls it."""
        weight_N = self.weight_N.read() if self.active else None
        if self.losses is not None:
            logits = self._with_losses(logits, self.losses, weight_N)
        probs, routed = super().routing(logits, padding_mask)
        if self.load_XY is not None:
            self.load_XY[self.layer_number - 1] += (routed * weight_N[:, None]).sum(0)
        return probs, routed

    def _with_losses(self, logits: Tensor, losses: RouterLosses, weight_N: Tensor) -> Tensor:
        """Returns the logits [N, 1, Y] with the gradient of the losses, whose values are added up."""
        if not torch.is_grad_enabled():  # the recomputation adds them
            return logits
        layer, rows = self.layer_number - 1, logits.flatten(0, 1).float()
        balance_N = (rows.softmax(-1) * losses.share_XY[layer]).sum(-1) * self.num_experts
        balance = (weight_N * balance_N).sum()
        z = (weight_N * rows.logsumexp(-1).square()).sum()
        losses.values_X2[layer] += torch.stack([balance, z]).detach()
        return MoEAuxLossAutoScaler.apply(logits, losses.balance * balance + losses.z * z)
