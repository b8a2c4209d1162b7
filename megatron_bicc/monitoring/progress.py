"""The progress bar of a run."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


class ProgressBar:
    """A bar over steps with elapsed and remaining time, the last reward and the last pass@1."""

    def __init__(self, steps: int, done: int = 0, stream: TextIO | None = None) -> None:
        """steps: of the whole run; done: those a resumed run need not do again; stream: stderr if None."""
        self._shown: dict[str, str] = {}
        self._bar: Any = tqdm(
            total=steps,
            initial=done,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            file=stream or sys.stderr,
        )

    def show(self, metrics: Mapping[str, float]) -> None:
        """Shows the reward and pass@1 that metrics hold; each stays until the next one comes."""
        for label, key in (("reward", "reward/mean"), ("pass@1", "eval/pass_at_1")):
            if key in metrics:
                self._shown[label] = f"{metrics[key]:.3f}"
        self._bar.set_postfix(self._shown)

    def advance(self) -> None:
        """Counts one finished step."""
        self._bar.update(1)

    def close(self) -> None:
        """Leaves the bar as it stands and frees the line."""
        self._bar.close()
