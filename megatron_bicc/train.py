"""The driver: rollouts, learning, weight sync, evaluation, checkpoints; top to bottom.

torchrun --nproc-per-node 2 -m megatron_bicc.train --config examples/configs/tiny.yaml train.steps=60
"""

from megatron_bicc import launcher

if __name__ == "__main__":
    launcher.end_with_launcher()  # before the imports below, which take seconds

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Progress,
    check_writable,
    checkpoints,
    load_checkpoint,
)
from megatron_bicc.checkpoint.export import export, export_step, forget_exports
from megatron_bicc.checkpoint.resume import contents, resume_point
from megatron_bicc.cli import abort, parse_config, speak_once
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError, UserError
from megatron_bicc.evaluation.benchmarks import evaluate
from megatron_bicc.evaluation.results import evaluation_metrics
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.rollout.collect import GroupSampler, ZeroRewardWatch
from megatron_bicc.rollout.sampling import Collected
from megatron_bicc.rollout.types import RolloutError, Sampling
from megatron_bicc.run_log import RunLog
from megatron_bicc.startup import Inputs, Workers, read_inputs, start_workers
from megatron_bicc.training.step_metrics import (
    EngineMismatch,
    MismatchCheck,
    mean_metrics,
    report_groups,
    report_layout,
    rollout_metrics,
    update_metrics,
)
from megatron_bicc.weights.sync import sync_weights
from megatron_bicc.weights.transport import WeightSyncError

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """A run from its command line. What ends it early is one line on stderr and exit status 2."""
    config = parse_config(argv)
    try:
        run(config)
    except KeyboardInterrupt:
        abort(f"stopped; checkpoint.resume=true goes on from the newest checkpoint in {config.output_dir}")
    except RuntimeError as error:
        if not device.is_connection_loss(error):
            raise
        abort(f"{device.lost_connection(error)}; checkpoint.resume=true goes on", everywhere=True)


def run(config: Config) -> None:
    """A run: inputs, workers, every step."""
    try:
        if config.dry_run:
            print_dry_run(config)
            return
        inputs = read_inputs(config)
        workers = start_workers(inputs)
        first_step = restore(inputs, workers)
    except UserError as error:
        abort(str(error))
    try:
        train(inputs, workers, first_step)
    except (CheckpointError, EngineMismatch) as error:
        abort(str(error))
    except NotFiniteError as error:
        abort(
            f"{error}; look at train/grad_norm, ratio/* and kl/* of the steps before in metrics.jsonl, and "
            "change what made them grow, such as optimizer.lr: the same settings lead to the same step; "
            "checkpoint.resume=true resumes from the newest checkpoint"
        )
    except (RolloutError, WeightSyncError) as error:
        abort(f"{error}; checkpoint.resume=true goes on from the newest checkpoint")
    device.end_distributed()


def print_dry_run(config: Config) -> None:
    """Everything but the run. Raises UserError, one line."""
    # Imported late: a run has no use for it.
    from megatron_bicc.planning.dry_run import dry_run, summary

    speak_once(summary(dry_run(config, device.world_size())) + "\n", sys.stdout)


def train(inputs: Inputs, workers: Workers, first_step: int) -> None:
    """Every step of a run after the `first_step` that are finished. Collective."""
    with RunLog(inputs.config, first_step, enabled=dist.get_rank() == 0) as log:
        run_steps(inputs, workers, first_step, log)
        finish(inputs, workers, log)
    workers.engine.close()


def run_steps(inputs: Inputs, workers: Workers, first_step: int, log: RunLog) -> None:
    """Every step and checkpoint of `train`. Collective."""
    config = inputs.config
    writer = CheckpointWriter(config.output_dir, config.checkpoint.keep)
    mismatch = MismatchCheck(config, bool(workers.policy.megatron_config.num_moe_experts))
    sync_weights(workers.policy, workers.engine, first_step)
    watch = ZeroRewardWatch(config.reward.answer, enabled=dist.get_rank() == 0)
    if first_step == 0:
        log.step(0, held_out(inputs, workers))

    for step in range(first_step + 1, config.train.steps + 1):
        clock = Stopwatch()
        with clock("step"), ending_well(step, writer):
            with clock("rollout"):
                rollouts = roll_out(inputs, workers, step)
            learning_rate = workers.policy.learning_rate()
            with released_memory(inputs, workers):
                updates = learn(inputs, workers, rollouts, clock, log, step, mismatch)
            with clock("sync"):
                num_bytes = sync_weights(workers.policy, workers.engine, step)
            if why := watch.see(rollouts.sampled):
                _log.warning(why)
            metrics = rollout_metrics(rollouts, config) | mean_metrics(updates)
            metrics["train/lr"] = learning_rate
            metrics |= workers.engine.counts()
            metrics["sync/gb"] = num_bytes / 1e9
            if is_due(step, config.evaluation.every, config):
                with clock("eval"):
                    metrics |= held_out(inputs, workers)
            writer.check()
            if config.export.every and step % config.export.every == 0 and step < config.train.steps:
                with clock("export"):
                    export_step(workers.policy, config, step)
            if is_due(step, config.checkpoint.every, config):
                with clock("save"):
                    writer.snapshot(workers.policy, progress(inputs, workers, step))
        log.step(step, metrics | clock.metrics())
        # once the step's metrics are on disk: a run that goes on from its checkpoint lacks none
        writer.start()
    writer.wait()


@contextmanager
def ending_well(step: int, writer: CheckpointWriter) -> Iterator[None]:
    """What ends the run inside it is raised once the checkpoint that is being written is whole.

    A number that is not finite gets the step's number.
    """
    try:
        yield
    except NotFiniteError as error:
        writer.wait()
        raise NotFiniteError(f"step {step}: {error}") from error
    except (RolloutError, WeightSyncError):
        writer.wait()
        raise


def roll_out(inputs: Inputs, workers: Workers, step: int) -> Collected:
    """G scored rollouts of each of the step's prompts."""
    c = inputs.config.rollout
    sampling = Sampling(c.temperature, c.max_new_tokens)
    sampler = GroupSampler(workers.engine, inputs.verifier, inputs.tokenizer, sampling, c.group_size)
    return inputs.collector.step(step, sampler)


def released_memory(inputs: Inputs, workers: Workers) -> AbstractContextManager[None]:
    """The engine's memory is the trainer's inside it, if the two share their devices."""
    return workers.engine.memory_released() if inputs.config.rollout.colocate else nullcontext()


def learn(
    inputs: Inputs,
    workers: Workers,
    rollouts: Collected,
    clock: Stopwatch,
    log: RunLog,
    step: int,
    mismatch: MismatchCheck,
) -> list[dict[str, float]]:
    """The step's optimiser steps, each on its share of the groups; their metrics."""
    config = inputs.config
    # groups carried over from an earlier step were sampled with other weights
    check = None if rollouts.carried else partial(mismatch.step, step)
    results = workers.learner.step(rollouts.groups, clock, check)
    if results and is_due(step, config.evaluation.every, config):
        log.groups(step, report_groups(results[0], inputs.tokenizer, config))
        log.layout(step, report_layout(results[0], config))
    return [update_metrics(result, config) for result in results]


def held_out(inputs: Inputs, workers: Workers) -> dict[str, float]:
    """pass@1 and pass@k on the held-out prompts; nothing without any."""
    c = inputs.config
    if not inputs.heldout:
        return {}
    sampling = Sampling(c.evaluation.temperature, c.rollout.max_new_tokens)
    sampler = GroupSampler(workers.engine, inputs.verifier, inputs.tokenizer, sampling, c.evaluation.samples)
    result = evaluate(inputs.heldout, sampler, c.seed, c.reward.threshold)
    return evaluation_metrics(result)


def is_due(step: int, every: int, config: Config) -> bool:
    """Whether something done every so many steps, and at the last, is done at this one."""
    return step == config.train.steps or (every > 0 and step % every == 0)


def progress(inputs: Inputs, workers: Workers, step: int) -> Progress:
    """Where the run stands after this step."""
    c = inputs.config
    state = workers.policy.scheduler.state_dict()
    found = contents(c) | inputs.prompt_digests
    return Progress(step, inputs.collector.state_dict(), state, asdict(c), found)


def restore(inputs: Inputs, workers: Workers) -> int:
    """Loads the newest checkpoint if the run is to go on from one; returns the number of finished steps.

    Exports after it are removed, as RunLog removes the metrics.
    """
    config, first_process = inputs.config, dist.get_rank() == 0
    check_writable(config.output_dir)
    found = resume_point(config, inputs.prompt_digests, inputs.collector, first_process)
    step = found.progress.step if found else 0
    if found:
        load_checkpoint(found.path, workers.policy, found.progress)
    if config.checkpoint.resume and first_process:
        forget_exports(config.output_dir, step)
    return step


def finish(inputs: Inputs, workers: Workers, log: RunLog) -> None:
    """The trained policy as a Hugging Face directory, the report, and where to look."""
    config = inputs.config
    target = Path(config.output_dir) / "hf"
    export(workers.policy, config, target)
    log.finish(last_checkpoint=checkpoints(config.output_dir)[-1], export=target)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron_bicc").setLevel(logging.INFO)
    main(sys.argv[1:])
