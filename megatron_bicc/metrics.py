"""Run logging: settings, metrics, groups and layouts in files; start-up phases and steps in the log.

Files in output_dir: config.yaml, metrics.jsonl, groups.jsonl, layout.jsonl, tensorboard/, report.html.
docs/metrics.md lists the keys.
"""

import importlib
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypedDict

import yaml
from tqdm import tqdm

from megatron_bicc import launcher, run_lock
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.files import append_jsonl, atomic_file, keep_jsonl

METRICS_FILE = "metrics.jsonl"
GROUPS_FILE = "groups.jsonl"
LAYOUT_FILE = "layout.jsonl"
SETTINGS_FILE = "config.yaml"
SHOWN = {"reward": "reward/mean", "pass@1": "eval/pass_at_1"}
"""Metrics on the progress bar and in the line of a step, by their labels"""
WAIT_S = 10.0
"""Seconds after which `waiting_for` logs what it waits for"""
WAIT_AGAIN_S = 60.0

logger = logging.getLogger(__name__)


class Stopwatch:
    """Wall-clock seconds by stage: `with clock("pack"):` adds the block's seconds to "pack"."""

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
        """Returns the seconds of every stage as time/STAGE_s."""
        return {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Logs that this process waits for `what`, once the block has taken WAIT_S seconds, then every minute.

    what: a noun phrase, such as "the other processes at 10.0.0.1:29500".
    """
    ended = threading.Event()

    def report() -> None:
        begin, pause = time.monotonic(), WAIT_S
        while not ended.wait(pause):
            waited = time.monotonic() - begin
            logger.info("process %d: still waiting for %s (%.0f s)", launcher.rank(), what, waited)
            pause = WAIT_AGAIN_S

    threading.Thread(target=report, name=f"waiting for {what}", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def phase(name: str) -> Iterator[list[str]]:
    """Logs a start-up phase on rank 0: its name, the entries that the block appends to the list, its seconds.

    `name` is a noun phrase: a rank that is still inside after ten seconds logs that it waits for it.
    """
    start, found = time.perf_counter(), []
    with waiting_for(name):
        yield found
    if launcher.rank() == 0:
        seconds = time.perf_counter() - start
        logger.info("%s (%.1f s)", ": ".join(filter(None, [name, ", ".join(found)])), seconds)


class ProgressBar:
    """Progress bar over steps with elapsed and remaining time, the last reward and the last pass@1."""

    def __init__(self, steps: int, done: int = 0, stream: TextIO | None = None) -> None:
        """steps: of the whole run; done: steps before the resume point; stream: None is stderr."""
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
        """Shows the reward and pass@1 among the metrics; each stays until there is a new one."""
        for label, key in SHOWN.items():
            if key in metrics:
                self._shown[label] = f"{metrics[key]:.3f}"
        self._bar.set_postfix(self._shown)

    def advance(self) -> None:
        """Counts one finished step."""
        self._bar.update(1)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        self._bar.close()


class RolloutRecord(TypedDict):
    """One rollout of a group in groups.jsonl."""

    text: str
    reward: float
    advantage: float
    correct: bool
    context: str
    """Text between prompt and response in its training sequence; empty without BICC."""


class GroupRecord(TypedDict):
    """One prompt with its rollouts."""

    prompt: str
    ground_truth: str
    rollouts: Sequence[RolloutRecord]


class SideRecord(TypedDict):
    """A prefix and its responses inside a micro-batch in layout.jsonl; sizes in rows."""

    group: int
    """Index among the step's trained groups; those with contrast in groups.jsonl are the first of them"""
    prefix: int
    responses: list[int]
    correct: list[bool]
    """One entry per response"""


class MicroBatchRecord(TypedDict):
    """A packed micro-batch: the prefixes of all sides, then their responses, then padding."""

    padding: int
    sides: list[SideRecord]


class PlanRecord(TypedDict):
    """The micro-batches of every data-parallel rank under one layout."""

    context: bool
    """True if the prefixes hold BICC's context"""
    ranks: list[list[MicroBatchRecord]]


class LayoutRecord(TypedDict):
    """The packing of a step's groups."""

    budget: int
    """Most rows of a micro-batch"""
    plans: list[PlanRecord]


class MetricsWriter:
    """Writes each step's numbers to metrics.jsonl, TensorBoard and Weights & Biases. For one rank."""

    def __init__(self, output_dir: str | Path, tensorboard: bool, wandb_project: str) -> None:
        """Makes output_dir. Raises UserError if Weights & Biases is enabled but not installed."""
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _open_tensorboard(self.output_dir) if tensorboard else None
        self._wandb = _open_wandb(self.output_dir, wandb_project) if wandb_project else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and returns once it is on disk.

        Values are Python, NumPy or zero-dimensional torch numbers; one that is not finite becomes null.
        Raises TypeError that names a metric that is not a number.
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
        """Drops what was written after `step`, before a run resumes from that step's checkpoint."""
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
    """Appends the groups of a step to groups.jsonl, one JSON object {step, prompt, ...} per line."""
    append_jsonl(Path(output_dir) / GROUPS_FILE, ({"step": step, **group} for group in groups))


def write_layout(output_dir: str | Path, step: int, layout: LayoutRecord) -> None:
    """Appends the layout of a step to layout.jsonl as one line {step, budget, plans}."""
    append_jsonl(Path(output_dir) / LAYOUT_FILE, [{"step": step, **layout}])


def write_settings(output_dir: str | Path, settings: Mapping[str, Any]) -> None:
    """Writes every setting to config.yaml, which --config reads again; atomically replaces an earlier one."""
    with atomic_file(Path(output_dir) / SETTINGS_FILE) as draft:
        draft.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name} is {value!r}; it must be a number") from error


def _open_tensorboard(output_dir: Path, purge_step: int | None = None) -> Any:
    # Imported late: it takes seconds, and monitoring.tensorboard may be off.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)


def import_wandb(project: str) -> ModuleType:
    """Imports the optional package wandb. Raises UserError, with the remedy, if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise UserError(
            f"monitoring.wandb_project is {project}, but the package wandb is not installed; "
            "pip install wandb, or leave the setting empty"
        ) from error


def _open_wandb(output_dir: Path, project: str) -> Any:
    return import_wandb(project).init(
        project=project, name=output_dir.name, dir=str(output_dir), resume="auto"
    )


class RunLog:
    """Writes the files and log lines of a run on rank 0; on other ranks every call does nothing.

    Where stderr is a terminal there is a progress bar, else one line per step in the log.
    """

    def __init__(self, config: Config, enabled: bool) -> None:
        self._config, self._enabled = config, enabled

    @contextmanager
    def open(self, first_step: int) -> Iterator[None]:
        """Opens the files for the block, and ends the progress bar's line after it, also after an error.

        first_step: finished steps of a resumed run, 0 for a new one; later records in the files are dropped.
        Raises UserError if Weights & Biases is enabled but not installed.
        """
        if not self._enabled:
            yield
            return
        run_lock.check()
        config, monitoring = self._config, self._config.monitoring
        self._writer = MetricsWriter(config.output_dir, monitoring.tensorboard, monitoring.wandb_project)
        write_settings(config.output_dir, asdict(config))
        # a run that starts at 0 writes step 0 itself
        self._writer.truncate_after(first_step if first_step > 0 else -1)
        self._bar = ProgressBar(config.train.steps, first_step) if sys.stderr.isatty() else None
        try:
            yield
        finally:
            if self._bar:
                self._bar.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a finished step; step 0 is the evaluation before the first."""
        if not self._enabled:
            return
        run_lock.check()
        self._writer.write(step, metrics)
        if self._bar is None:
            logger.info("step %d/%d%s", step, self._config.train.steps, _words(metrics))
            return
        self._bar.show(metrics)
        if step > 0:
            self._bar.advance()

    def groups(self, step: int, groups: Sequence[GroupRecord]) -> None:
        """Records a few groups of a step, for the report."""
        if self._enabled:
            run_lock.check()
            write_groups(self._config.output_dir, step, groups)

    def layout(self, step: int, layout: LayoutRecord) -> None:
        """Records how a step's groups were packed, for the report."""
        if self._enabled:
            run_lock.check()
            write_layout(self._config.output_dir, step, layout)

    def finish(self, last_checkpoint: Path, export: Path) -> None:
        """Writes report.html and prints the paths of all outputs."""
        if not self._enabled:
            return
        run_lock.check()
        self._writer.close()
        if self._bar:
            self._bar.close()
        # Imported late: it loads a drawing library, and steps must not wait for that.
        from megatron_bicc.report.page import write_report

        output_dir, monitoring = Path(self._config.output_dir), self._config.monitoring
        report = write_report([output_dir, *filter(None, [monitoring.compare_run])])
        print(f"report        {report}")
        print(f"metrics       {output_dir / METRICS_FILE}")
        if monitoring.tensorboard:
            print(f"tensorboard   {output_dir / 'tensorboard'}")
        print(f"checkpoint    {last_checkpoint}")
        print(f"Hugging Face  {export}")


def _words(metrics: Mapping[str, float]) -> str:
    """Returns the step's line, ": reward 0.512, pass@1 0.250, 12.3 s", of the metrics that it has."""
    words = [f"{label} {metrics[key]:.3f}" for label, key in SHOWN.items() if key in metrics]
    if "time/step_s" in metrics:
        words.append(f"{metrics['time/step_s']:.1f} s")
    return f": {', '.join(words)}" if words else ""
