"""The weight of a token in the step's loss: the one place where denominators are computed.

All denominators are of the whole optimiser step, so the loss of the step is a plain sum over micro-batches
and ranks, however the step was cut. Rollouts of groups without contrast count, though their policy loss is 0.

Shape suffix: R rollouts of the optimiser step.
"""

from typing import Literal

import numpy as np

Aggregation = Literal["sequence_mean", "constant", "token_mean"]


def token_weights(lengths_R: np.ndarray, kind: Aggregation, constant_length: int) -> np.ndarray:
    """float64 [R]: the weight of each token of a rollout, over ALL N rollouts of the optimiser step.

    "sequence_mean" 1 / (N |o_r|): mean over tokens, then over sequences (GRPO, arXiv 2402.03300).
    "constant" 1 / (N L) with L = constant_length: sum over tokens by a constant (Dr. GRPO, arXiv 2503.20783).
    "token_mean" 1 / sum |o|: mean over all tokens (DAPO, arXiv 2503.14476).
    Raises ValueError for a length below 1, with the rollout's index, and for "constant" without a length.
    """
    lengths_R = np.asarray(lengths_R)
    bad = np.flatnonzero(lengths_R < 1)
    if len(bad):
        raise ValueError(
            f"response of rollout {bad[0]} has length {lengths_R[bad[0]]}; it must be at least 1 token"
        )
    count = len(lengths_R)
    if kind == "sequence_mean":
        return 1.0 / (count * lengths_R.astype(np.float64))
    if kind == "token_mean":
        return np.full(count, 1.0 / max(int(lengths_R.sum()), 1))
    if constant_length < 1:
        raise ValueError(
            f"aggregation 'constant' divides by the longest response, but constant_length is "
            f"{constant_length}; set rollout.max_new_tokens"
        )
    return np.full(count, 1.0 / (max(count, 1) * constant_length))
