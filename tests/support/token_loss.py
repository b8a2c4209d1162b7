"""Cases of the token loss, for its CUDA kernels on a GPU and for their arithmetic on the host.

Shape suffixes: T response tokens, all responses one after another, R responses.
"""

import numpy as np
import torch

from megatron_bicc.algorithms.policy_loss import LossRows, load_objective, policy_loss
from megatron_bicc.config import LossConfig

OBJECTIVES = ["token", "sequence", "geometric", "aspo", "cispo"]
ESTIMATORS = ["k1", "k2", "k3"]


def loss_config(objective: str, estimator: str = "k3") -> LossConfig:
    """Returns settings with every term that the kernels have switched on."""
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
    """Returns the kernels' inputs in their order, float64 [T] each: ratios on both sides of every edge."""
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
    """Returns (loss, its gradient [T]) by the package's PyTorch code, from float64 inputs."""
    tensors = dict(inputs)
    logp_T = tensors.pop("logp").detach().requires_grad_()
    response_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(logp_T.device)
    # the kernels have one weight for all terms, and take mu itself
    mismatch = tensors["old_logp"] - tensors.pop("rollout_logp")
    rows = LossRows(
        **tensors, response=response_T, regularisation=tensors["weight"], engine_log_ratio=mismatch
    )
    loss = policy_loss(logp_T, None, rows, config).share
    loss.backward()
    return loss.item(), logp_T.grad


def clip_masks(
    log_ratio_T: np.ndarray, advantage_R: np.ndarray, offsets_R: np.ndarray, config: LossConfig
) -> dict[str, np.ndarray]:
    """Returns bool [T] by edge: the tokens that the package's objective reports as clipped."""
    lengths_R = np.diff(offsets_R)
    logp_T = torch.from_numpy(np.asarray(log_ratio_T, np.float64))
    advantage_T = torch.from_numpy(np.repeat(advantage_R, lengths_R).astype(np.float64))
    response_T = torch.from_numpy(np.repeat(np.arange(len(lengths_R)), lengths_R))
    zeros_T = torch.zeros_like(logp_T)
    rows = LossRows(advantage_T, torch.ones_like(logp_T), response_T, old_logp=zeros_T)
    found = load_objective(config)(logp_T, zeros_T, rows, config)
    return {"low": found.low.numpy(), "high": found.high.numpy(), "dual": found.dual.numpy()}
