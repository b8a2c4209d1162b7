"""Whether a run's settings make sense together, before anything is loaded."""

import math
import os
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config, ParallelConfig, flatten
from megatron_bicc.errors import UserError
from megatron_bicc.plugins import is_import_path
from megatron_bicc.sglang.checks import check_servers

POSITIVE_COUNTS = (
    "train.steps",
    "train.updates_per_step",
    "train.max_sequence_tokens",
    "train.max_tokens_per_microbatch",
    "data.max_prompt_tokens",
    "rollout.prompts_per_step",
    "rollout.max_new_tokens",
    "rollout.batch_size",
    "rollout.sglang.servers_per_node",
    "rollout.sglang.max_concurrency",
    "rollout.max_prompts_per_step",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.expert",
    "parallel.context",
    "evaluation.every",
    "evaluation.samples",
    "checkpoint.keep",
    "export.keep",
)
NOT_NEGATIVE = (
    "reward.overlong_penalty",
    "evaluation.prompts",
    "checkpoint.every",
    "export.every",
    "monitoring.report_groups",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "synthetic.prompt_sigma",
    "synthetic.response_sigma",
)
POSITIVE = (
    "rollout.temperature",
    "rollout.sglang.start_timeout_s",
    "rollout.sglang.health_timeout_s",
    "rollout.sglang.request_timeout_s",
    "rollout.sglang.retry_s",
    "reward.overlong_share",
    "weight_sync.timeout_s",
    "evaluation.temperature",
    "optimizer.eps",
)
SHARES = ("bicc.weight", "bicc.context_ratio", "reward.overlong_share", "synthetic.pass_rate")
NAMED = {
    "rollout.engine": ("local", "sglang"),
    "loss.objective": ("token", "sequence", "geometric", "aspo", "cispo"),
    "loss.baseline": ("mean",),
}
DECAYS = ("optimizer.beta1", "optimizer.beta2")


def validate(config: Config, world_size: int) -> None:
    """Raises UserError, one line that names setting, value and remedy, for the first mistake found.

    world_size: number of processes of the run. Files are looked for, not read, and so are optional packages.
    A dry run does without data.train.
    """
    config = resolve(config)
    _check_ranges(flatten(asdict(config)))
    _check_names(flatten(asdict(config)))
    check_processes(config.parallel, world_size)
    _check_batches(config)
    _check_budget(config)
    _check_files(config)
    check_servers(config.rollout)
    if config.monitoring.wandb_project:
        # Imported late: it brings the drawing library along.
        from megatron_bicc.metrics import import_wandb

        import_wandb(config.monitoring.wandb_project)


def validate_evaluation(config: Config, benchmarks: list[str]) -> None:
    """`validate` for what megatron_bicc.evaluate uses of the settings, and its benchmark files."""
    _check_ranges(flatten(asdict(resolve(config))))
    _check_model(config)
    check_servers(config.rollout)
    for path in benchmarks:
        _check_file("--benchmark", path)


def _check_ranges(values: dict[str, Any]) -> None:
    """values: every setting by its dotted name."""
    for name, value in values.items():
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{name} is {value!r}; it must not hold a NUL character")
    if values["data.date"] and not _is_date(values["data.date"]):
        raise UserError(
            f"data.date is {values['data.date']!r}; write a date as YYYY-MM-DD, or leave it empty"
        )
    finite = {name: not isinstance(value, float) or math.isfinite(value) for name, value in values.items()}
    _require(values, finite, "it must be finite")
    _require(values, {n: values[n] >= 1 for n in POSITIVE_COUNTS}, "it must be at least 1")
    _require(values, {n: values[n] >= 0 for n in NOT_NEGATIVE}, "it must be at least 0")
    _require(values, {n: values[n] > 0 for n in POSITIVE}, "it must be greater than 0")
    _require(values, {n: 0 <= values[n] <= 1 for n in SHARES}, "it must be within 0 and 1")
    _require(values, {n: 0 <= values[n] < 1 for n in DECAYS}, "it must be at least 0 and less than 1")
    lengths = ("synthetic.prompt_tokens", "synthetic.response_tokens")
    _require(values, {n: values[n] is None or values[n] >= 1 for n in lengths}, "it must be at least 1")
    seed = {"seed": 0 <= values["seed"] < 2**31}
    _require(values, seed, "it must be at least 0 and less than 2147483648")
    bucket = {"weight_sync.bucket_mb": values["weight_sync.bucket_mb"] >= 1}
    _require(values, bucket, "it must be at least 1: every bucket is a call to every server")
    silence = values["parallel.silence_seconds"]
    heard = {"parallel.silence_seconds": silence == 0 or silence >= 5}
    _require(values, heard, "it must be at least 5, as hosts are heard of every 2 seconds, or 0 for off")
    group_size = {"rollout.group_size": values["rollout.group_size"] >= 2}
    _require(values, group_size, "it must be at least 2: rollouts learn from the others of their group")


def _check_names(values: dict[str, Any]) -> None:
    """What is a row of a table, or an import path."""
    for name, known in NAMED.items():
        if values[name] not in known and not is_import_path(values[name]):
            raise UserError(
                f"{name} is {values[name]!r}; it must be {', '.join(known)} or an import path, module:name"
            )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _require(values: dict[str, Any], holds: dict[str, bool], remedy: str) -> None:
    for name, good in holds.items():
        if not good:
            raise UserError(f"{name} is {values[name]}; {remedy}")


def check_processes(layout: ParallelConfig, world_size: int) -> None:
    """Raises UserError for a layout that no policy can have over so many processes."""
    if layout.context != 1:
        raise UserError(
            f"parallel.context is {layout.context}; context parallel is not supported, set it to 1"
        )
    if layout.sequence and layout.tensor == 1:
        raise UserError("parallel.sequence is true; it needs parallel.tensor of at least 2, which is 1")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise UserError(
            f"parallel.virtual_pipeline is {layout.virtual_pipeline}; "
            "it needs parallel.pipeline of at least 2, which is 1"
        )
    for first, size in (("tensor", layout.tensor), ("expert", layout.expert)):
        if world_size % (size * layout.pipeline):
            raise UserError(
                f"parallel.{first} is {size} and parallel.pipeline is {layout.pipeline}; their product "
                f"{size * layout.pipeline} must divide the number of processes, {world_size}"
            )


def _check_batches(config: Config) -> None:
    prompts, updates = config.rollout.prompts_per_step, config.train.updates_per_step
    if prompts % updates:
        raise UserError(
            f"train.updates_per_step is {updates}; it must divide rollout.prompts_per_step = {prompts}"
        )
    most = config.rollout.max_prompts_per_step
    if config.rollout.dynamic_sampling and most < prompts:
        raise UserError(
            f"rollout.max_prompts_per_step is {most}; "
            f"it must be at least rollout.prompts_per_step = {prompts}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(
            f"optimizer.min_lr is {config.optimizer.min_lr}; "
            f"it must not exceed optimizer.lr = {config.optimizer.lr}"
        )


def _check_budget(config: Config) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    sequence, microbatch = config.train.max_sequence_tokens, config.train.max_tokens_per_microbatch
    if sequence < prompt + response:
        raise UserError(
            f"train.max_sequence_tokens is {sequence}; it must be at least data.max_prompt_tokens + "
            f"rollout.max_new_tokens = {prompt} + {response} = {prompt + response}"
        )
    if microbatch < sequence:
        raise UserError(
            f"train.max_tokens_per_microbatch is {microbatch}; it must hold the longest sequence, "
            f"train.max_sequence_tokens = {sequence} (of it data.max_prompt_tokens = {prompt} and "
            f"rollout.max_new_tokens = {response})"
        )


def _check_files(config: Config) -> None:
    for name, path, content in (
        ("model.path", config.model.path, "the Hugging Face directory of the policy"),
        ("data.train", config.data.train, "the file of training prompts"),
    ):
        if not path and not (config.dry_run and name == "data.train"):
            raise UserError(f"{name} is not set; set it to {content}")
    _check_model(config)
    if config.data.train:
        _check_file("data.train", config.data.train)
    if config.evaluation.data:
        _check_file("evaluation.data", config.evaluation.data)
    if config.monitoring.compare and not (Path(config.monitoring.compare) / "metrics.jsonl").is_file():
        raise UserError(f"monitoring.compare is {config.monitoring.compare}; there is no metrics.jsonl in it")


def _check_model(config: Config) -> None:
    model = Path(config.model.path)
    if (model / "metadata.json").is_file() and not (model / "config.json").is_file():
        raise UserError(
            f"model.path is {model}; it is a Megatron checkpoint, but a run starts from a Hugging Face "
            "directory: make one of it by tools/convert_hf_checkpoint.py export"
        )
    if not (model / "config.json").is_file():
        raise UserError(f"model.path is {config.model.path}; there is no Hugging Face config.json in it")


def _check_file(name: str, path: str) -> None:
    if Path(path).is_dir():
        raise UserError(f"{name} is {path}; it is a directory, give one .parquet or .jsonl file")
    if not Path(path).is_file():
        raise UserError(f"{name} is {path}; there is no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name} is {path}; the file cannot be read, check its permissions")
