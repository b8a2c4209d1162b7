"""Scored groups as the flat arrays that algorithms and packing work on.

Shape suffixes: G groups, R rollouts, T tokens of all responses.
"""

from dataclasses import dataclass

import numpy as np

from megatron_bicc.packing.types import RolloutBatch
from megatron_bicc.rollout.types import Group


@dataclass(frozen=True)
class StepBatch:
    """The rollouts of one optimiser step."""

    rollouts: RolloutBatch
    rollout_logp_T: np.ndarray
    """float32 [T]: log-probs as the rollout engine computed them"""

    @property
    def lengths_R(self) -> np.ndarray:
        """int64 [R]: tokens of each response."""
        return np.diff(self.rollouts.offsets_R)


def step_batch(groups: list[Group]) -> StepBatch:
    """Flat arrays of groups, in their order."""
    samples = [sample for group in groups for sample in group.samples]
    prompts = [group.prompt.token_ids for group in groups]
    rollouts = RolloutBatch(
        prompt_tokens=_concatenate(prompts, np.int32),
        prompt_offsets_G=_offsets([len(p) for p in prompts]),
        tokens=_concatenate([s.token_ids for s in samples], np.int32),
        offsets_R=_offsets([len(s.token_ids) for s in samples]),
        group_offsets_G=_offsets([len(group.samples) for group in groups]),
        rewards_R=_concatenate([group.rewards for group in groups], np.float32),
    )
    return StepBatch(rollouts, _concatenate([s.log_probs for s in samples], np.float32))


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
