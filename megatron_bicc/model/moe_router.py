"""The router of a mixture of experts: megatron-core's, with losses and counts over a whole optimizer step.

megatron-core's own losses divide by the tokens of a micro-batch, so that their gradient would depend on the
packing. Here each response row has a weight, and the weights of a step add up to 1 before it is cut. Prefix
rows have none: how often a prefix is repeated depends on the packing.

Shape suffixes: N rows of a micro-batch that this tensor-parallel rank routes, X layers of the whole model, Y
experts of a layer.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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
        self._weight_N: Tensor | None = None
        self._to_recompute: list[Tensor] = []

    @property
    def active(self) -> bool:
        """Whether the next pass needs the rows' weights."""
        return self.load_XY is not None or self.losses is not None

    def start(self, weight_N: Tensor) -> None:
        """Sets the weights, float32, of the micro-batch whose forward pass comes next."""
        self._weight_N = weight_N

    def finish(self) -> None:
        """Ends counting and losses, at the end of a pass or after an error in it."""
        self.load_XY = self.losses = self._weight_N = None
        self._to_recompute.clear()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns probabilities [N, Y] and the map of assignments, bool [N, Y]; megatron-core calls it."""
        if self.losses is not None:
            logits = self._with_losses(logits, self.losses)
        probs, routed = super().routing(logits, padding_mask)
        if self.load_XY is not None:
            self.load_XY[self.layer_number - 1] += (routed * self._weight_N[:, None]).sum(0)
        return probs, routed

    def _with_losses(self, logits: Tensor, losses: RouterLosses) -> Tensor:
        """Returns the logits [N, 1, Y] with the gradient of the losses, whose values are added up."""
        weight_N = self._weight_of_call()
        if not torch.is_grad_enabled():  # the recomputation adds them
            return logits
        layer, rows = self.layer_number - 1, logits.flatten(0, 1).float()
        balance_N = (rows.softmax(-1) * losses.share_XY[layer]).sum(-1) * self.num_experts
        balance = (weight_N * balance_N).sum()
        z = (weight_N * rows.logsumexp(-1).square()).sum()
        losses.values_X2[layer] += torch.stack([balance, z]).detach()
        return MoEAuxLossAutoScaler.apply(logits, losses.balance * balance + losses.z * z)

    def _weight_of_call(self) -> Tensor:
        """Returns the weights of this call's micro-batch.

        Under pipeline parallel, recomputations of earlier micro-batches come between forward passes.
        Activation checkpointing runs the forward pass without gradients and the recomputation with them, and
        a chunk's micro-batches go backward in the order in which they went forward.
        """
        if not torch.is_grad_enabled():
            self._to_recompute.append(self._weight_N)
        elif self._to_recompute:
            return self._to_recompute.pop(0)
        return self._weight_N
