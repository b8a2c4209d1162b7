"""Masks of the tokens that an objective clips, from NumPy arrays.

Shape suffixes: T response tokens, all responses one after another, R responses.
"""

import numpy as np
import torch

from megatron_bicc.algorithms.policy_loss import LossRows, load_objective
from megatron_bicc.config import LossConfig


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
