"""Start-up: reads and checks settings and files, then connects the processes and compares them.

In this order, after device.choose_device, so that a mistake is found within seconds, before any process waits
for another or loads weights.
"""

import logging
import os
import string
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_bicc import device, plugins, run_lock
from megatron_bicc.algorithms.presets import kl_warning, resolve
from megatron_bicc.checkpoint.checkpoint import checkpoints
from megatron_bicc.checkpoint.resume import (
    HELD_OUT_IDS,
    TRAIN_IDS,
    ResumePoint,
    check_resume,
    digests_of_files,
    resume_point,
)
from megatron_bicc.collective import raised_on_all_ranks
from megatron_bicc.config import Config, RolloutConfig, check, check_values
from megatron_bicc.consistency import check_agreement
from megatron_bicc.data.encoding import asks_for_date, end_token_ids, fix_date
from megatron_bicc.data.prompts import Prompt, PromptSampler, digest, load_prompts
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.metrics import import_wandb, phase
from megatron_bicc.model.build import backend, transformer_config
from megatron_bicc.model.families import family_of, positions, supported_config
from megatron_bicc.model.megatron_settings import check_megatron_settings, row_alignment
from megatron_bicc.model.optimizer import optimizer_config
from megatron_bicc.model.policy import ddp_config, start_model_parallel
from megatron_bicc.rewards.registry import Verifier, check_reward, check_truths, get_verifier
from megatron_bicc.rollout.async_collector import make_collector
from megatron_bicc.rollout.sampling import Collector
from megatron_bicc.rollout.sglang_engine import check_model_files
from megatron_bicc.sglang.pool import server_positions
from megatron_bicc.sglang.settings import check_servers
from megatron_bicc.weights.hf_files import HfTensors, checked_tensors, has_safetensors, warn_of_index

logger = logging.getLogger(__name__)


def validate(config: Config, world_size: int) -> None:
    """Raises UserError, one line with setting, value and remedy, for the first setting that cannot be used.

    world_size: number of processes. Files must exist but are not read. A dry run needs no data.train.
    """
    config = resolve(config)
    check(config, world_size)
    _check_files(config)
    check_servers(config.rollout)
    _check_gpus(config.rollout)
    check_megatron_settings(config)
    _check_microbatch(config)
    if config.monitoring.wandb_project:
        import_wandb(config.monitoring.wandb_project)


def _check_microbatch(config: Config) -> None:
    """Raises UserError if the longest sequence would not fit a micro-batch, as the packer requires."""
    budget, ranks, alignment = (
        config.train.max_tokens_per_microbatch,
        config.parallel.context,
        row_alignment(config),
    )
    capacity, sequence = ranks * (budget // alignment * alignment), config.train.max_sequence_tokens
    if capacity >= sequence:
        return
    rounded = f", in multiples of {alignment} rows" if alignment > 1 else ""
    times = f"parallel.context = {ranks} times that{rounded} is {capacity}; "
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    raise UserError(
        f"train.max_tokens_per_microbatch is {budget}; {times if capacity != budget else ''}it must hold the "
        f"longest sequence, train.max_sequence_tokens = {sequence} (of which data.max_prompt_tokens = "
        f"{prompt} and rollout.max_new_tokens = {response})"
    )


def _check_gpus(rollout: RolloutConfig) -> None:
    is_spawned = rollout.engine == "sglang" and rollout.launch == "spawn"
    if is_spawned and not (rollout.colocate or rollout.sglang.gpus) and device.has_cuda():
        raise UserError(
            "rollout.sglang.gpus is empty; a server would take most of GPU 0, on which the policy trains: "
            "name GPUs that do not train, or set rollout.colocate=true to share those that do"
        )


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


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of a run."""

    config: Config
    """Resolved: presets filled in, and data.date if the chat template needs it"""
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    prompts: list[Prompt]
    heldout: list[Prompt]
    contents: dict[str, str]
    """SHA-256 of files and token ids by name; must be equal on all ranks and when the run is resumed"""
    collector: Collector
    """In the state of the resume point, if there is one"""
    resume: ResumePoint | None
    """The checkpoint to resume from; None: the run starts at step 0"""
    tensors: HfTensors | None = None
    """The policy's initial weights, opened and checked"""


def read_inputs(config: Config) -> Inputs:
    """Reads and checks every setting and file. Not collective.

    Raises UserError, one line, for the first mistake, and for a checkpoint that the run may not resume from.
    """
    config = check_settings(config)
    with phase("tokenizer"):
        tokenizer = read_tokenizer(config.model.path)
    hf_config, tensors = check_policy(config)
    check_lengths(config, hf_config)
    return read_prompts(config, tokenizer, tensors)


def read_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, tensors: HfTensors | None = None
) -> Inputs:
    """Reads the rest of a run's inputs, once settings, policy and tokenizer are checked."""
    is_first = device.is_first()
    found = resume_point(config, is_first)
    config = with_date(config, tokenizer, found.date if found else "")
    verifier = get_verifier(config.reward)
    with phase("prompts") as sizes:
        prompts = _prompts(config, config.data.train, tokenizer, config.data.instruction, config.data.filter)
        heldout = heldout_prompts(config, config.evaluation.data, tokenizer) if config.evaluation.data else []
        sizes += [f"{len(prompts)} for training", f"{len(heldout)} held out"]
    contents = digests_of_files(config) | {TRAIN_IDS: digest(prompts)}
    contents |= {HELD_OUT_IDS: digest(heldout)} if heldout else {}
    sampler = PromptSampler(len(prompts), config.rollout.prompts_per_step, config.seed)
    collector = make_collector(config, prompts, sampler)
    if found:
        check_resume(found.progress, config, contents, is_first)
        collector.load_state_dict(found.progress.sampler)
    return Inputs(config, tokenizer, verifier, prompts, heldout, contents, collector, found, tensors)


def check_settings(config: Config) -> Config:
    """Checks settings, and that files and the run's directory exist; returns them with presets filled in.

    Raises UserError, one line, for the first mistake.
    """
    validate(config, device.world_size())
    _check_output_dir(config)
    check_reward(config.reward)
    config = resolve(config)
    if not config.dry_run:
        _check_device(config)
    # now, not when they are first used: a wrong import path must not cost the minutes of loading a policy
    for setting, path in (
        ("rollout.engine", config.rollout.engine),
        ("loss.objective", config.loss.objective),
        ("loss.baseline", config.loss.baseline),
        ("reward.verifier", config.reward.verifier),
        ("data.filter", config.data.filter),
    ):
        if plugins.is_import_path(path):
            plugins.load(setting, path)
    return config


def _check_device(config: Config) -> None:
    """Raises UserError for a setting that the device of this run does not support."""
    kernels, dtype = config.model.attention, config.model.dtype
    if kernels != "auto" and not device.has_cuda():
        raise UserError(
            f"model.attention is {kernels}; this run is on the CPU, which has one kernel: set auto"
        )
    if kernels != "auto" and dtype == "float32":
        raise UserError(
            f"model.attention is {kernels} and model.dtype is float32; flash attention takes 16 bits: set "
            "model.attention=auto or model.dtype=bfloat16"
        )
    if config.megatron.optimizer.get("optimizer_cpu_offload") and not device.has_cuda():
        raise UserError(
            "megatron.optimizer.optimizer_cpu_offload is true; this run is on the CPU already: remove it"
        )
    if config.megatron.optimizer.get("optimizer_cpu_offload") and dtype == "float32":
        raise UserError(
            "megatron.optimizer.optimizer_cpu_offload is true and model.dtype is float32; megatron-core "
            "moves the fp32 copies of 16-bit weights only: set model.dtype=bfloat16"
        )


def join_processes(inputs: Inputs) -> None:
    """Makes the process groups, locks output_dir, and checks that all ranks run the same. Collective.

    Raises UserError, one line, if the processes cannot connect, another run holds output_dir, or ranks
    differ.
    """
    config = inputs.config
    disable_progress_bar()  # the run has its own
    with phase("process group") as sizes:
        device.start_distributed()
        sizes.append(f"{dist.get_world_size()} processes")
        if device.is_first():
            sizes.append(device.description())
        sizes.append(f"kernels: {device.choose_kernels(config.model.kernels)}")
    with phase("lock and agreement of all processes"):
        hold_output_dir(config)
        _check_resume_point(inputs)
        check_agreement(config, inputs.contents, backend())
        device.watch_hosts(config.parallel.heartbeat_timeout_s)
    with phase("model-parallel groups"):
        start_model_parallel(config)


def hold_output_dir(config: Config) -> None:
    """Locks the directory that the run writes to, until the process ends. Collective.

    Raises UserError, one line, on every rank if another run holds it or nothing can be written there.
    """
    with raised_on_all_ranks(UserError):
        if dist.get_rank() == 0:
            run_lock.hold(config.output_dir)


def _check_resume_point(inputs: Inputs) -> None:
    """Raises UserError if a checkpoint was written between reading the resume point and taking the lock."""
    config, expected = inputs.config, inputs.resume.path if inputs.resume else None
    newest = next(reversed(checkpoints(config.output_dir)), None)
    if config.checkpoint.resume and newest != expected:
        raise UserError(
            f"checkpoint.resume: {newest} was written while this run started, by another run in output_dir; "
            "start again"
        )


def _check_output_dir(config: Config) -> None:
    if not config.output_dir:
        raise UserError("output_dir is empty; name the directory that the run writes to")
    path = Path(config.output_dir)
    try:
        used = (path / "metrics.jsonl").exists()
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    except (OSError, ValueError) as error:
        raise UserError(
            f"output_dir is {config.output_dir[:200]!r}; it cannot be a directory: {error}"
        ) from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"output_dir is {config.output_dir!r}; {str(nearest)!r} is not a writable directory")
    run_lock.refuse_if_alive(config.output_dir)
    if used and not config.checkpoint.resume:
        raise UserError(
            f"output_dir is {config.output_dir}; it already contains a run: choose another directory, "
            "delete it, or resume that run with checkpoint.resume=true"
        )


def check_policy(config: Config) -> tuple[PretrainedConfig, HfTensors | None]:
    """Checks the configuration and the tensors of model.path, and returns both.

    A dry run needs no weights. Raises UserError, one line, for a model that is not supported or damaged, or
    that a rollout server would read differently.
    """
    path = Path(config.model.path)
    hf_config, tensors = supported_config(path), None
    # megatron-core checks its configurations when they are made: now, not after processes have connected
    megatron_config = transformer_config(hf_config, config)
    layers = hf_config.num_hidden_layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)
    unit = megatron_config.recompute_num_layers
    if megatron_config.recompute_method == "uniform" and layers % unit:
        raise UserError(
            f"megatron.transformer.recompute_num_layers is {unit}; with recompute_method=uniform it must "
            f"divide the {layers} layers of a pipeline stage"
        )
    optimizer_config(config)
    ddp_config(config)
    if has_safetensors(path) or not config.dry_run:
        with phase("headers of the policy's files") as sizes:
            tensors = checked_tensors(path, hf_config)
            sizes.append(f"{len(tensors.file_of)} tensors")
        if config.rollout.engine == "sglang" and config.rollout.launch == "spawn":
            check_model_files(path, hf_config, set(tensors.file_of.values()))
    return hf_config, tensors


def check_lengths(config: Config, hf_config: PretrainedConfig) -> None:
    """Raises UserError if a rollout can be longer than the positions of the model or of its server."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    most = engine_positions(config, hf_config)
    if prompt + response > most:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {prompt} + {response} = {prompt + response}; "
            f"{config.model.path} has {most} positions (max_position_embeddings in config.json, "
            "--context-length of a server): lower the settings"
        )


def engine_positions(config: Config, hf_config: PretrainedConfig) -> int:
    """Returns the length in tokens of the longest sequence that model and rollout engine accept."""
    most = positions(hf_config)
    if config.rollout.engine == "sglang":
        return min(most, server_positions(hf_config, config.rollout))
    return most


def warn_of_model(config: Config, hf_config: PretrainedConfig) -> None:
    """Warns, on rank 0, of settings that are valid but probably unintended. `config` is resolved."""
    if not device.is_first():
        return
    warn_of_index(config.model.path)
    warning = kl_warning(config.loss)
    if warning:
        logger.warning(warning)
    if config.rollout.max_staleness and config.loss.correction == "none":
        logger.warning(
            "rollout.max_staleness is %d and loss.correction is none: rollouts of older weights are trained "
            "as if the policy had sampled them; loss.correction=token_tis weighs them (docs/algorithms.md)",
            config.rollout.max_staleness,
        )
    experts = family_of(hf_config).experts
    if device.has_cuda() and experts and backend() != "Transformer Engine":
        logger.warning(
            "%s has experts, and Transformer Engine is not installed: each expert is computed by kernels of "
            "its own, and launching them takes longer than their work (docs/policy.md)",
            config.model.path,
        )
    if config.parallel.context > 1 and plugins.is_import_path(config.loss.objective):
        logger.warning(
            "loss.objective is %r and parallel.context is %d: the function gets a part of a response's rows, "
            "so it must average over a response by policy_loss.response_mean only (docs/extending.md)",
            config.loss.objective,
            config.parallel.context,
        )
    longest, most = config.train.max_sequence_tokens, positions(hf_config)
    if config.bicc.enabled and longest > most:
        logger.warning(
            "train.max_sequence_tokens is %d; %s has %d positions: longer contexts would train positions "
            "that it has never seen",
            longest,
            config.model.path,
            most,
        )


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Reads the model's tokenizer.

    Raises UserError, one line, if it is damaged or does not fit the model's config.json, or if an end token
    is not in the vocabulary.
    """
    hf_config = supported_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise any type for a damaged file
        raise UserError(f"model.path is {path}; its tokenizer cannot be read: {first_line(error)}") from error
    if len(tokenizer) > hf_config.vocab_size:
        raise UserError(
            f"model.path is {path}; its tokenizer has {len(tokenizer)} tokens, "
            f"but vocab_size in config.json is {hf_config.vocab_size}: they are of different models"
        )
    if not tokenizer.encode(string.printable, add_special_tokens=False):
        raise UserError(
            f"model.path is {path}; its tokenizer encodes any text to no tokens: "
            "tokenizer.json is missing or damaged"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path is {path}; its tokenizer has no eos_token: responses could not end")
    end_token_ids(hf_config, tokenizer, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_date(config: Config, tokenizer: PreTrainedTokenizerBase, first_start: str) -> Config:
    """Fixes the date that the chat template sees, if it uses one; returns config with data.date.

    first_start: data.date of the run that is resumed; empty for a new run.
    """
    if not asks_for_date(tokenizer):
        return config
    day = config.data.date or first_start or date.today().isoformat()
    if not config.data.date and device.is_first():
        logger.warning(
            "model.path is %s; its chat template uses today's date: every prompt gets data.date=%s, also "
            "when the run is resumed on another day",
            config.model.path,
            day,
        )
    fix_date(tokenizer, date.fromisoformat(day))
    return replace(config, data=replace(config.data, date=day))


def heldout_prompts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Reads the first evaluation.prompts prompts of a file, with evaluation.instruction.

    Raises UserError for a row whose ground truth no response can match.
    """
    prompts = _prompts(config, path, tokenizer, config.evaluation.instruction)
    return prompts[: config.evaluation.prompts or None]


def _prompts(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, instruction: str, keep: str = ""
) -> list[Prompt]:
    data = config.data
    prompts = load_prompts(
        path, tokenizer, data.max_prompt_tokens, data.overlong_prompts, instruction, data.control_tokens, keep
    )
    check_truths(config.reward, path, prompts)
    return prompts
