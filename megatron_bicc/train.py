"""Training driver: rollouts, learning, weight sync, evaluation and checkpoints.

torchrun --nproc-per-node 2 -m megatron_bicc.train --config examples/configs/tiny.yaml train.steps=60
"""

from megatron_bicc import launcher

if __name__ == "__main__":
    launcher.end_with_launcher()  # before the imports below, which take seconds

import logging
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import (
    CheckpointWriter,
    Progress,
    check_writable,
    checkpoints,
    export,
    export_step,
    forget_exports,
    load_checkpoint,
)
from megatron_bicc.cli import parse_config
from megatron_bicc.config import Config
from megatron_bicc.errors import PROGRAM, NotFiniteError, UserError, abort, print_rank0
from megatron_bicc.evaluation.benchmarks import evaluate, evaluation_metrics
from megatron_bicc.metrics import RunLog, Stopwatch, phase, waiting_for
from megatron_bicc.model.policy import Policy
from megatron_bicc.rewards.registry import answer_style
from megatron_bicc.rollout.collect import GroupSampler, ZeroRewardWatch
from megatron_bicc.rollout.engines import make_engine
from megatron_bicc.rollout.sampling import Collected
from megatron_bicc.rollout.types import Engine, RolloutError, Sampling, unscored
from megatron_bicc.startup import Inputs, join_processes, read_inputs, warn_of_model
from megatron_bicc.training.learner import Learner, StepResult, Update
from megatron_bicc.training.step_metrics import (
    MismatchCheck,
    current_log_probs,
    gpu_metrics,
    mean_metrics,
    report_groups,
    report_layout,
    rollout_metrics,
    update_metrics,
)
from megatron_bicc.weights.hf_weights import load_policy
from megatron_bicc.weights.sync import WeightSync, make_weight_sync
from megatron_bicc.weights.transport import WeightSyncError

RESUME = "resume from the newest checkpoint with checkpoint.resume=true"

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Runs the command line. errors.py lists what each kind of exception prints."""
    device.limit_connections()
    try:
        run(parse_config(argv))
    except UserError as error:
        abort(str(error))
    except KeyboardInterrupt:
        abort(f"interrupted; {RESUME}")
    except (RolloutError, WeightSyncError) as error:
        logger.error("%s: error: %s; %s", PROGRAM, error, RESUME)
        raise
    except RuntimeError as error:
        if device.is_connection_loss(error):
            logger.error("%s: error: %s; %s", PROGRAM, device.lost_connection(error), RESUME)
        raise


def run(config: Config) -> None:
    """Trains; with dry_run checks the run without starting it."""
    if config.dry_run:
        # Imported late: a run does not need it.
        from megatron_bicc.planning.dry_run import dry_run, summary

        print_rank0(summary(dry_run(config, device.world_size())) + "\n", sys.stdout)
        return
    device.choose_device()
    inputs = read_inputs(config)
    join_processes(inputs)
    with closing(build_trainer(inputs)) as trainer:
        trainer.restore()
        trainer.run()
    with waiting_for("the other processes at the end of the run"):
        device.end_distributed()


def build_trainer(inputs: Inputs) -> "Trainer":
    """Builds policy, learner and rollout engine, after `join_processes`. Collective.

    Raises UserError, one line, for weights, an engine or a server that cannot be used.
    """
    config = inputs.config
    with phase("policy") as sizes:
        policy = load_policy(config, inputs.tensors)
        local = sum(parameter.numel() for module in policy.modules for parameter in module.parameters())
        sizes.append(f"{local:,} parameters on rank 0")
    warn_of_model(config, policy.hf_config)
    with phase("learner"):
        learner = Learner(config, policy, inputs.tokenizer)
    with phase(f"rollout engine {config.rollout.engine}"):
        engine = make_engine(config, inputs.tokenizer)
        weight_sync = make_weight_sync(
            config, policy, engine, lambda sequences: learner.log_probs(unscored(sequences))
        )
    return Trainer(inputs, policy, learner, engine, weight_sync)


class Trainer:
    """Owns the state of a run and executes its steps. Every method is collective."""

    def __init__(
        self, inputs: Inputs, policy: Policy, learner: Learner, engine: Engine, weight_sync: WeightSync
    ) -> None:
        config, is_first = inputs.config, dist.get_rank() == 0
        self.inputs, self.config = inputs, config
        self.policy, self.learner = policy, learner
        self.engine, self.weight_sync = engine, weight_sync
        self.collector = inputs.collector
        self.step = inputs.resume.progress.step if inputs.resume else 0
        """The step in progress; between steps, the number of finished ones"""
        self.log = RunLog(config, enabled=is_first)
        self.writer = CheckpointWriter(config.output_dir, config.checkpoint.keep)
        self.mismatch = MismatchCheck(config, bool(policy.megatron_config.num_moe_experts))
        self.zero_rewards = ZeroRewardWatch(answer_style(config.reward), enabled=is_first)

    def restore(self) -> None:
        """Loads the checkpoint to resume from, if there is one, and removes the exports after it.

        Raises CheckpointError if the checkpoint is damaged or output_dir cannot be written.
        """
        config, found = self.config, self.inputs.resume
        check_writable(config.output_dir)
        if found:
            with phase("resume point") as sizes:
                load_checkpoint(found.path, self.policy, found.progress)
                sizes.append(f"step {found.progress.step} of {found.path}")
        if config.checkpoint.resume and dist.get_rank() == 0:
            forget_exports(config.output_dir, self.step)

    def run(self) -> None:
        """Trains to the last step, exports the policy and writes the report."""
        with self.log.open(self.step):
            # the engine started with the weights of model.path; a restored policy has others
            with phase("first weight sync"):
                self.sync()
            if self.step == 0:
                self.log.step(0, self.evaluate())
            while self.step < self.config.train.steps:
                self.step += 1
                with self._raised_after_checkpoint():
                    self.train_step()
            self.writer.wait()
            target = Path(self.config.output_dir) / "hf"
            export(self.policy, self.config, target)
            self.log.finish(last_checkpoint=checkpoints(self.config.output_dir)[-1], export=target)

    def train_step(self) -> None:
        """Samples, learns and syncs the weights; evaluates, exports and saves when they are due."""
        config, clock = self.config, Stopwatch()
        with clock("step"):
            with clock("rollout"):
                rollouts = self.roll_out()
            metrics = rollout_metrics(rollouts, config) | {"train/lr": self.policy.learning_rate()}
            # a colocated engine frees its memory here and is without weights until the sync below
            with self.engine.memory_released() if config.rollout.colocate else nullcontext():
                results = self.learn(rollouts, clock)
            metrics |= mean_metrics([update_metrics(result, config, self.step - 1) for result in results])
            learning = clock.seconds["logprob"] + clock.seconds["train"] if results else 0.0
            metrics |= gpu_metrics(results, learning, self.policy.hf_config, config)
            with clock("sync"):
                metrics["sync/gb"] = self.sync() / 1e9
            if why := self.zero_rewards.see(rollouts.sampled):
                logger.warning(why)
            metrics |= self.engine.counts()
            if self._is_due(config.evaluation.every):
                # the report shows the first update of a step that evaluates
                if results:
                    self.log.groups(self.step, report_groups(results[0], self.inputs.tokenizer, config))
                    self.log.layout(self.step, report_layout(results[0], config))
                with clock("eval"):
                    metrics |= self.evaluate()
            self.writer.check()
            # the last step's export is written to hf/ at the end
            if self.step < config.train.steps and self._is_due(config.export.every):
                with clock("export"):
                    export_step(self.policy, config, self.step)
            if self._is_due(config.checkpoint.every):
                with clock("save"):
                    self.save()
        self.log.step(self.step, metrics | clock.metrics())
        # after the metrics are on disk: a run that resumes from this checkpoint must have them all
        self.writer.start()

    def roll_out(self) -> Collected:
        """Samples and scores the step's groups."""
        c = self.config.rollout
        routing = self.config.model.routing_replay == "engine"
        return self.collector.step(self.step, self._sampler(c.temperature, c.group_size, routing))

    def learn(self, rollouts: Collected, clock: Stopwatch) -> list[StepResult]:
        """Takes the step's optimizer steps, each on a share of groups; a share without a loss is skipped.

        Raises EngineMismatch before the first of them if engine and policy compute different models.
        """

        def check(updates: list[Update]) -> None:
            self.mismatch.step(self.step, current_log_probs(updates, self.step - 1))

        return self.learner.step(rollouts.groups, clock, check)

    def sync(self) -> int:
        """Sends the policy's weights to the engine as version `step`; returns their size in bytes."""
        return self.weight_sync.sync(self.step)

    def evaluate(self) -> dict[str, float]:
        """Returns pass@1 and pass@k on the held-out prompts; nothing if there are none."""
        c = self.config
        if not self.inputs.heldout:
            return {}
        sampler = self._sampler(c.evaluation.temperature, c.evaluation.samples)
        return evaluation_metrics(evaluate(self.inputs.heldout, sampler, c.seed, c.reward.threshold))

    def save(self) -> None:
        """Copies the run's state for a checkpoint of this step; `writer.start` writes it."""
        self.writer.snapshot(self.policy, self.progress())

    def progress(self) -> Progress:
        """Returns the run's state beside weights and optimizer."""
        schedule = self.policy.scheduler.state_dict()
        collector = self.collector.state_dict()
        return Progress(self.step, collector, schedule, asdict(self.config), self.inputs.contents)

    def close(self) -> None:
        """Ends rollouts and closes their engine. Does not wait for a checkpoint that is being written."""
        self.collector.close()
        self.weight_sync.close()
        self.engine.close()

    def _sampler(self, temperature: float, group_size: int, routing: bool = False) -> GroupSampler:
        sampling = Sampling(temperature, self.config.rollout.max_new_tokens, routing)
        return GroupSampler(self.engine, self.inputs.verifier, self.inputs.tokenizer, sampling, group_size)

    def _is_due(self, every: int) -> bool:
        """Returns whether an action of every `every` steps (0: never), and of the last step, is due now."""
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    @contextmanager
    def _raised_after_checkpoint(self) -> Iterator[None]:
        """Completes a checkpoint that is being written before an error ends the run.

        For errors that every rank raises: torchrun kills the other ranks as soon as one exits.
        """
        try:
            yield
        except NotFiniteError as error:
            self.writer.wait()
            raise NotFiniteError(
                f"step {self.step}: {error}; look at train/grad_norm, ratio/* and kl/* of the steps before "
                "in metrics.jsonl, and change what made them grow, such as optimizer.lr: the same settings "
                "lead to the same step; checkpoint.resume=true resumes from the newest checkpoint"
            ) from error
        except (UserError, RolloutError, WeightSyncError):
            self.writer.wait()
            raise


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron_bicc").setLevel(logging.INFO)
    record(main)(sys.argv[1:])  # torchrun's error file gets the exception of the first rank that fails
