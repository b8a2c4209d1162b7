"""Checks settings against files, packages and presets, after the checks of config.check."""

import os
from pathlib import Path

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config, check, check_values
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import import_wandb
from megatron_bicc.sglang.settings import check_servers


def validate(config: Config, world_size: int) -> None:
    """Raises UserError, one line with setting, value and remedy, for the first setting that cannot be used.

    world_size: number of processes. Files must exist but are not read. A dry run needs no data.train.
    """
    config = resolve(config)
    check(config, world_size)
    _check_files(config)
    check_servers(config.rollout)
    if config.monitoring.wandb_project:
        import_wandb(config.monitoring.wandb_project)


def validate_evaluation(config: Config, benchmarks: list[str]) -> None:
    """Checks the settings that megatron_bicc.evaluate uses, and its benchmark files, like `validate`."""
    check_values(config)
    _check_model(config)
    check_servers(config.rollout)
    for path in benchmarks:
        _check_file("--benchmark", path)


def _check_files(config: Config) -> None:
    if not config.model.path:
        raise UserError("model.path is not set; set it to the Hugging Face directory of the policy")
    _check_model(config)
    if config.data.train:
        _check_file("data.train", config.data.train)
    elif not config.dry_run:
        raise UserError("data.train is not set; set it to the file of training prompts")
    if config.evaluation.data:
        _check_file("evaluation.data", config.evaluation.data)
    other = config.monitoring.compare_run
    if other and not (Path(other) / "metrics.jsonl").is_file():
        raise UserError(f"monitoring.compare_run is {other}; there is no metrics.jsonl in it")


def _check_model(config: Config) -> None:
    model = Path(config.model.path)
    if (model / "config.json").is_file():
        return
    if (model / "metadata.json").is_file():
        raise UserError(
            f"model.path is {model}; it is a Megatron checkpoint, but a run starts from a Hugging Face "
            "directory: convert it with tools/convert_hf_checkpoint.py export"
        )
    raise UserError(f"model.path is {config.model.path}; there is no Hugging Face config.json in it")


def _check_file(name: str, path: str) -> None:
    if Path(path).is_dir():
        raise UserError(f"{name} is {path}; it is a directory, give one .parquet or .jsonl file")
    if not Path(path).is_file():
        raise UserError(f"{name} is {path}; there is no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name} is {path}; the file cannot be read, check its permissions")
