"""Everything that a run tells: the files it writes, its progress bar, its last words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from megatron_bicc import run_lock
from megatron_bicc.config import Config
from megatron_bicc.metrics import (
    METRICS_FILE,
    GroupRecord,
    LayoutRecord,
    MetricsWriter,
    ProgressBar,
    write_groups,
    write_layout,
    write_settings,
)
from megatron_bicc.report.page import write_report


class RunLog:
    """The log of a run in config.output_dir. Leaving its `with` frees the progress bar's line."""

    def __init__(self, config: Config, first_step: int, enabled: bool) -> None:
        """first_step: finished steps of a resumed run, 0 for a new one; what stands after it is forgotten.

        enabled: true on one process of the run; on the others every call does nothing. Raises UserError if
        Weights & Biases is asked for and not installed.
        """
        self._config, self._enabled = config, enabled
        if not enabled:
            return
        run_lock.check()
        monitoring = config.monitoring
        self._writer = MetricsWriter(config.output_dir, monitoring.tensorboard, monitoring.wandb_project)
        write_settings(config.output_dir, asdict(config))
        # A run that starts at 0 writes step 0 itself.
        self._writer.truncate_after(first_step if first_step > 0 else -1)
        self._bar = ProgressBar(config.train.steps, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._bar.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a finished step; step 0 is the evaluation before the first."""
        if not self._enabled:
            return
        run_lock.check()
        self._writer.write(step, metrics)
        self._bar.show(metrics)
        if step > 0:
            self._bar.advance()

    def groups(self, step: int, groups: Sequence[GroupRecord]) -> None:
        """A few groups of a step, for the report."""
        if self._enabled:
            run_lock.check()
            write_groups(self._config.output_dir, step, groups)

    def layout(self, step: int, layout: LayoutRecord) -> None:
        """How a step's groups were packed, for the report."""
        if self._enabled:
            run_lock.check()
            write_layout(self._config.output_dir, step, layout)

    def finish(self, last_checkpoint: Path, export: Path) -> None:
        """Writes report.html and prints where everything is."""
        if not self._enabled:
            return
        run_lock.check()
        self._writer.close()
        self._bar.close()
        output_dir, monitoring = Path(self._config.output_dir), self._config.monitoring
        report = write_report([output_dir, *filter(None, [monitoring.compare_run])])
        print(f"report        {report}")
        print(f"metrics       {output_dir / METRICS_FILE}")
        if monitoring.tensorboard:
            print(f"tensorboard   {output_dir / 'tensorboard'}")
        print(f"checkpoint    {last_checkpoint}")
        print(f"Hugging Face  {export}")
