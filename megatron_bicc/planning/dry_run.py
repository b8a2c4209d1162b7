"""Dry run: checks all that a run's start-up checks, builds every rank's shard, packs one synthetic step."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc.checkpoint.checkpoint import check_writable, checkpoints
from megatron_bicc.config import Config
from megatron_bicc.model.build import describe
from megatron_bicc.planning.shards import Shard, build_shards, data_parallel_size
from megatron_bicc.planning.synthetic import SyntheticStep, UnknownTokenizer, synthetic_step
from megatron_bicc.rollout.local import check_names
from megatron_bicc.startup import (
    Inputs,
    check_lengths,
    check_policy,
    check_settings,
    heldout_prompts,
    read_prompts,
    read_tokenizer,
    warn_of_model,
)
from megatron_bicc.weights.hf_files import INDEX, SINGLE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class DryRun:
    """The results of a dry run."""

    config: Config
    """Resolved: presets filled in"""
    hf_config: PretrainedConfig
    world_size: int
    shards: list[Shard]
    step: SyntheticStep
    unchecked: list[str]
    """One line for each thing that could not be checked, with the reason"""

    @property
    def data_parallel(self) -> int:
        return data_parallel_size(self.config.parallel, self.world_size)


def dry_run(config: Config, world_size: int) -> DryRun:
    """Checks a run of `world_size` processes without starting any.

    Raises UserError, one line, for the first error that the run's start-up would raise.
    """
    unchecked: list[str] = []
    config = check_settings(config)
    path = Path(config.model.path)
    tokenizer = tokenizer_or_estimate(config.model.path)
    hf_config, weights = check_policy(config)
    check_lengths(config, hf_config)
    warn_of_model(config, hf_config)
    if isinstance(tokenizer, UnknownTokenizer):
        unchecked.append(f"the tokenizer: {path} contains none; the headers' lengths are estimates")
    _check_prompts(config, tokenizer, unchecked)
    if config.rollout.engine == "sglang":
        unchecked.append("rollout servers: none is started or contacted")
    if weights is None:
        unchecked.append(f"weights: {path} contains neither {SINGLE} nor {INDEX}")
    for name in config.megatron.optimizer:
        unchecked.append(f"megatron.optimizer.{name}: the optimizer's size is that without it")
    shards = build_shards(config, hf_config, world_size, weights=weights)
    if config.rollout.engine == "local":
        with torch.device("meta"):
            check_names(AutoModelForCausalLM.from_config(hf_config), hf_config)
    step = synthetic_step(config, hf_config, tokenizer, data_parallel_size(config.parallel, world_size))
    return DryRun(config, hf_config, world_size, shards, step, unchecked)


def tokenizer_or_estimate(path: str) -> PreTrainedTokenizerBase | UnknownTokenizer:
    """Returns the model's tokenizer, or an estimate if there is none. Raises UserError, one line."""
    if any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return read_tokenizer(path)
    return UnknownTokenizer()


def _check_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase | UnknownTokenizer, unchecked: list[str]
) -> None:
    """Reads the prompts and checks the checkpoint to resume from, as far as they exist."""
    train, heldout = config.data.train, config.evaluation.data
    if not train:
        unchecked.append("prompts: data.train is not set")
    if (train or heldout) and isinstance(tokenizer, UnknownTokenizer):
        unchecked.append("prompts: they cannot be read without a tokenizer")
    elif train:
        _check_resume(read_prompts(config, tokenizer), unchecked)
        return
    elif heldout:
        heldout_prompts(config, heldout, tokenizer)
    if config.checkpoint.resume and checkpoints(config.output_dir):
        unchecked.append("checkpoint: it cannot be compared without the training prompts")


def _check_resume(inputs: Inputs, unchecked: list[str]) -> None:
    config = inputs.config
    if (Path(config.output_dir) / "checkpoints").exists():  # a dry run makes no directory
        check_writable(config.output_dir)
    if inputs.resume:
        unchecked.append(f"checkpoint: weights and optimizer in {inputs.resume.path}")


def summary(found: DryRun) -> str:
    """Formats the results: layout, distinct shards, the synthetic step, what was not checked, warnings."""
    lines = [*_layout_lines(found), *_shard_lines(found.shards), *_step_lines(found)]
    lines += [f"not checked: {line}" for line in found.unchecked]
    return "\n".join(lines)


def _layout_lines(found: DryRun) -> list[str]:
    layout = found.config.parallel
    virtual = f" x {layout.virtual_pipeline} chunks" if layout.virtual_pipeline > 1 else ""
    sequence = " with sequence parallel" if layout.sequence else ""
    context = f"context {layout.context}, " if layout.context > 1 else ""
    return [
        describe(found.hf_config),
        f"{found.world_size} processes: tensor {layout.tensor}{sequence}, {context}"
        f"pipeline {layout.pipeline}{virtual}, data {found.data_parallel}, expert {layout.expert}",
    ]


def _shard_lines(shards: list[Shard]) -> list[str]:
    """Formats one line per pipeline stage: its ranks differ only in their share of the optimizer."""
    lines = [f"shards of {len(shards)} sizes, the largest of each pipeline stage (GB = 1e9 bytes per rank):"]
    for stage in sorted({shard.pipeline_rank for shard in shards}):
        own = [shard for shard in shards if shard.pipeline_rank == stage]
        worst = max(own, key=lambda shard: shard.total_bytes)
        lines.append(
            f"  stage {stage}: layers {_ranges(worst.layers)}, "
            f"{worst.parameters:,} parameters, weights {worst.weight_bytes / 1e9:.2f} GB, "
            f"gradients {worst.gradient_bytes / 1e9:.2f} GB, optimizer {worst.optimizer_bytes / 1e9:.2f} GB"
        )
    return lines


def _ranges(numbers: tuple[int, ...]) -> str:
    """Formats layer numbers as ranges, such as 1-5, 21."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, stops, strict=True)
    return ", ".join(f"{start}-{stop}" if start < stop else f"{start}" for start, stop in pairs)


def _step_lines(found: DryRun) -> list[str]:
    step = found.step
    lines = [
        f"synthetic step: {step.groups} groups of {found.config.rollout.group_size}, "
        f"{step.groups_with_contrast} with right and wrong rollouts; "
        f"{step.prompt_tokens:,} prompt and {step.response_tokens:,} response tokens"
    ]
    for number, update in enumerate(step.updates, 1):
        for layout, plan in update.trained.items():
            lines.append(
                f"  update {number}, {layout}: {plan.stats['tokens_packed']:,} rows instead of "
                f"{plan.stats['tokens_rows']:,}, micro-batches per data-parallel rank: {len(plan.ranks[0])}, "
                f"{plan.stats['fill']:.0%} full, imbalance {plan.stats['imbalance']:.2f}"
            )
    return lines
