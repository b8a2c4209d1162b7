"""Sums over segments of a flat array, and checks of a step's flat arrays.

The code that builds an array calls the checks (training.batch.collate, the learner's log-probs); code that
computes with it does not check again.

Shape suffixes: E elements, S segments. Offsets hold S + 1 entries: segment s is [offsets[s], offsets[s + 1]).
"""

import numpy as np

from megatron_bicc.errors import NotFiniteError


def check_offsets(offsets_S: np.ndarray, total: int, name: str, segment: str) -> None:
    """Raises ValueError unless the offsets cut `total` elements into consecutive, non-empty segments.

    For the message: `name` is the array's name, `segment` what a segment is ("group", "rollout").
    """
    offsets_S = np.asarray(offsets_S)
    if offsets_S.ndim != 1 or len(offsets_S) < 1 or offsets_S.dtype.kind not in "iu":
        raise ValueError(f"{name} must be one integer array with one entry more than there are {segment}s")
    if offsets_S[0] != 0 or offsets_S[-1] != total:
        raise ValueError(
            f"{name} must run from 0 to {total}, but it runs from {offsets_S[0]} to {offsets_S[-1]}"
        )
    bad = np.flatnonzero(np.diff(offsets_S.astype(np.int64)) <= 0)
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{name}: {segment} {first} has length {offsets_S[first + 1] - offsets_S[first]}, "
            "but every length must be at least 1"
        )


def check_log_probs(logp_E: np.ndarray, offsets_S: np.ndarray, name: str) -> None:
    """Raises NotFiniteError, with the rollout and token index, for a log-prob that is infinite or NaN."""
    bad = np.flatnonzero(~np.isfinite(logp_E))
    if len(bad):
        rollout = int(np.searchsorted(offsets_S, bad[0], side="right")) - 1
        token = int(bad[0] - offsets_S[rollout])
        raise NotFiniteError(
            f"{name} of rollout {rollout}, token {token} is {logp_E[bad[0]]}; "
            "it must be finite: check that this policy can emit the token"
        )


def check_rewards(rewards_R: np.ndarray) -> None:
    """Raises NotFiniteError, with the rollout index, for a reward that is infinite or NaN."""
    bad = np.flatnonzero(~np.isfinite(rewards_R))
    if len(bad):
        raise NotFiniteError(
            f"reward of rollout {bad[0]} is {rewards_R[bad[0]]}; a verifier must return finite rewards"
        )


def segment_sums(values_E: np.ndarray, offsets_S: np.ndarray) -> np.ndarray:
    """Returns the sum of each segment: float64 [S]."""
    if len(offsets_S) == 1:
        return np.zeros(0)
    return np.add.reduceat(np.asarray(values_E, dtype=np.float64), offsets_S[:-1])


def segment_means(values_E: np.ndarray, offsets_S: np.ndarray) -> np.ndarray:
    """Returns the mean of each segment: float64 [S]."""
    return segment_sums(values_E, offsets_S) / np.diff(offsets_S)


def spread(values_S: np.ndarray, offsets_S: np.ndarray) -> np.ndarray:
    """Returns each segment's value, repeated for each of its elements: [E]."""
    return np.repeat(values_S, np.diff(offsets_S))
