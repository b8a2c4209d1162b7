"""Cases of the token loss, for its CUDA kernels on a GPU and for their arithmetic on the host.

Shape suffix: T response rows.
"""

import numpy as np
import torch

from megatron_bicc.algorithms.policy_loss import LossRows, policy_loss
from megatron_bicc.config import LossConfig

OBJECTIVES = ["token", "sequence", "geometric", "aspo", "cispo"]
ESTIMATORS = ["k1", "k2", "k3"]


def loss_config(objective: str, estimator: str = "k3") -> LossConfig:
    """Every term that the kernels have is on."""
    return LossConfig(
        objective=objective,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=1.2,
        tis_cap=1.2,
        kl_coefficient=0.1,
        kl_estimator=estimator,
    )


def loss_inputs(random: np.random.Generator, lengths: list[int]) -> dict[str, np.ndarray]:
    """Float64 [T] each, in the kernels' order: ratios on both sides of every edge."""
    rows = sum(lengths)
    old_T = -random.random(rows)
    return {
        "logp": old_T + random.normal(0, 0.9, rows),
        "old_logp": old_T,
        "advantage": np.repeat(random.normal(size=len(lengths)), lengths),
        "weight": random.random(rows),
        "ref_logp": old_T + random.normal(0, 0.3, rows),
        "rollout_logp": old_T + random.normal(0, 0.3, rows),
    }


def loss_in_torch(
    inputs: dict[str, torch.Tensor], lengths: list[int], config: LossConfig
) -> tuple[float, torch.Tensor]:
    """(loss, its gradient [T]) by the product's own PyTorch, from float64 inputs."""
    tensors = dict(inputs)
    logp_T = tensors.pop("logp").detach().requires_grad_()
    response_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(logp_T.device)
    # the kernels have one weight for all terms
    rows = LossRows(**tensors, response=response_T, regularisation=tensors["weight"])
    loss = policy_loss(logp_T, rows, config)
    loss.backward()
    return loss.item(), logp_T.grad
