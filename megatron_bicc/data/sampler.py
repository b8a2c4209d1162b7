"""The order in which prompts are learned from."""

import numpy as np


class PromptSampler:
    """Shuffled epochs over prompts; a draw may cross from one epoch into the next.

    The order depends on `seed` alone, and `state_dict` is all that it takes to go on where a run ended.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int):
        """Raises ValueError if a step would take more prompts than there are."""
        if not 0 < prompts_per_step <= num_prompts:
            raise ValueError(
                f"rollout.prompts_per_step={prompts_per_step} must be within 1 and the number of prompts "
                f"in data.train, {num_prompts}"
            )
        self._num_prompts = num_prompts
        self._seed = seed
        self._drawn = 0

    def draw(self, count: int) -> list[int]:
        """Indices of the next `count` prompts."""
        indices = self.peek(count)
        self._drawn += count
        return indices

    def peek(self, count: int) -> list[int]:
        """Indices of the next `count` prompts, without drawing them."""
        draws = range(self._drawn, self._drawn + count)
        epochs = {n // self._num_prompts for n in draws}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [int(orders[n // self._num_prompts][n % self._num_prompts]) for n in draws]

    def _order(self, epoch: int) -> np.ndarray:
        """int64 [num_prompts]: a permutation."""
        return np.random.default_rng([self._seed, epoch]).permutation(self._num_prompts)

    def state_dict(self) -> dict[str, int]:
        """What load_state_dict needs."""
        return {"drawn": self._drawn, "num_prompts": self._num_prompts, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last draw of a state; raises ValueError if it is of other data or another seed."""
        for name, now in (("num_prompts", self._num_prompts), ("seed", self._seed)):
            if state[name] != now:
                raise ValueError(
                    f"the checkpoint's prompt order has {name}={state[name]}, this run {now}; "
                    "resume with the same data.train and seed"
                )
        self._drawn = state["drawn"]
