"""Wall-clock seconds of a step, by stage.

The progress bar of a run.

What a run writes down: its settings, metrics.jsonl, groups.jsonl, layout.jsonl, TensorBoard, wandb.
"""

import importlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypedDict

import yaml
from tqdm import tqdm

from megatron_bicc.errors import UserError
from megatron_bicc.files import append_jsonl, keep_jsonl


class Stopwatch:
    """`with clock("pack"):` adds the block's seconds to stage "pack"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of every stage as time/STAGE_s."""
        return {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}


logger = logging.getLogger(__name__)
WAIT_S, WAIT_AGAIN_S = 10.0, 60.0
"""Seconds after which a wait is logged, and after which it is logged again"""


@contextmanager
def waiting_for(what: str, after_s: float = WAIT_S) -> Iterator[None]:
    """Logs what this process waits for, once the block has taken `after_s` seconds, and every minute after.

    what: a noun phrase, such as "the other processes at 10.0.0.1:29500".
    """
    ended = threading.Event()

    def report() -> None:
        begin, pause = time.monotonic(), after_s
        while not ended.wait(pause):
            logger.info("still waiting for %s (%.0f s)", what, time.monotonic() - begin)
            pause = WAIT_AGAIN_S

    threading.Thread(target=report, name=f"waiting for {what}", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


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


METRICS_FILE = "metrics.jsonl"
GROUPS_FILE = "groups.jsonl"
LAYOUT_FILE = "layout.jsonl"
SETTINGS_FILE = "config.yaml"


class RolloutRecord(TypedDict):
    """One rollout of a group, as groups.jsonl holds it."""

    text: str
    reward: float
    advantage: float
    correct: bool
    context: str
    """The text between prompt and response that it was trained under; empty without BICC."""


class GroupRecord(TypedDict):
    """One prompt with its rollouts."""

    prompt: str
    ground_truth: str
    rollouts: Sequence[RolloutRecord]


class SideRecord(TypedDict):
    """A prefix and its responses inside a micro-batch, in rows, as layout.jsonl holds them."""

    group: int
    """Counts the step's trained groups: those of groups.jsonl with contrast are the first of them."""
    prefix: int
    responses: list[int]
    correct: list[bool]
    """Of each response"""


class MicroBatchRecord(TypedDict):
    """A packed micro-batch: the prefixes of all sides, then their responses, then padding."""

    padding: int
    sides: list[SideRecord]


class PlanRecord(TypedDict):
    """The micro-batches of every data-parallel rank under one layout."""

    context: bool
    """Whether BICC's context stands in the prefixes"""
    ranks: list[list[MicroBatchRecord]]


class LayoutRecord(TypedDict):
    """How a step's groups were packed."""

    budget: int
    """Rows that a micro-batch may hold"""
    plans: list[PlanRecord]


class MetricsWriter:
    """Writes the numbers of each step; for one process of the run only. docs/metrics.md lists the keys."""

    def __init__(self, output_dir: str | Path, tensorboard: bool, wandb_project: str) -> None:
        """Makes output_dir. Raises UserError if Weights & Biases is asked for and not installed."""
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _open_tensorboard(self.output_dir) if tensorboard else None
        self._wandb = _open_wandb(self.output_dir, wandb_project) if wandb_project else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and returns once it is on disk.

        Values are Python, NumPy or zero-dimensional torch numbers; one that is not finite becomes null.
        Raises UserError that names a metric that is no number.
        """
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        finite = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        append_jsonl(self.output_dir / METRICS_FILE, [{"step": step, **finite}])
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def truncate_after(self, step: int) -> None:
        """Forgets what was written after `step`, before a run goes on from that step's checkpoint."""
        for name in (METRICS_FILE, GROUPS_FILE, LAYOUT_FILE):
            keep_jsonl(self.output_dir / name, lambda record: record["step"] <= step)
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = _open_tensorboard(self.output_dir, purge_step=step + 1)

    def close(self) -> None:
        """Flushes TensorBoard and finishes the Weights & Biases run."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def write_groups(output_dir: str | Path, step: int, groups: Sequence[GroupRecord]) -> None:
    """Appends the groups of a step to groups.jsonl, one JSON object {step, prompt, ...} a line."""
    append_jsonl(Path(output_dir) / GROUPS_FILE, ({"step": step, **group} for group in groups))


def write_layout(output_dir: str | Path, step: int, layout: LayoutRecord) -> None:
    """Appends the layout of a step to layout.jsonl as one line {step, budget, plans}."""
    append_jsonl(Path(output_dir) / LAYOUT_FILE, [{"step": step, **layout}])


def write_settings(output_dir: str | Path, settings: Mapping[str, Any]) -> None:
    """Writes every setting to config.yaml, which --config reads again; replaces an earlier one whole."""
    path = Path(output_dir) / SETTINGS_FILE
    draft = path.with_suffix(".new")
    draft.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(draft, path)


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"metric {name} is {value!r}; it must be a number") from None


def _open_tensorboard(output_dir: Path, purge_step: int | None = None) -> Any:
    # Imported late: reading a run back must not load torch.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)


def import_wandb(project: str) -> ModuleType:
    """The optional package wandb; raises ValueError, with what to do, where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise UserError(
            f"monitoring.wandb_project is {project}, but the package wandb is not installed; "
            "pip install wandb, or leave the setting empty"
        ) from None


def _open_wandb(output_dir: Path, project: str) -> Any:
    return import_wandb(project).init(
        project=project, name=output_dir.name, dir=str(output_dir), resume="auto"
    )
