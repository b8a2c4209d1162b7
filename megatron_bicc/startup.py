"""Everything that a run is made of, checked and built before the first step."""

import logging
import os
import string
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_bicc import device, run_lock
from megatron_bicc.algorithms.presets import kl_warning, resolve
from megatron_bicc.checkpoint.resume import HELD_OUT_IDS, TRAIN_IDS, date_of_checkpoint
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.consistency import check_agreement
from megatron_bicc.data.encoding import asks_for_date, end_token_ids, fix_date
from megatron_bicc.data.prompts import Prompt, PromptSampler, digest, load_prompts
from megatron_bicc.errors import UserError, first_line
from megatron_bicc.model.families import positions
from megatron_bicc.model.policy import Policy, start_model_parallel
from megatron_bicc.rewards.registry import (
    Verifier,
    check_reward,
    check_truths,
    get_verifier,
)
from megatron_bicc.rollout.local import LocalEngine, check_names
from megatron_bicc.rollout.sampling import Collector
from megatron_bicc.rollout.sglang_engine import SglangEngine
from megatron_bicc.rollout.types import Engine
from megatron_bicc.sglang.checks import check_model_files, server_positions
from megatron_bicc.training.learner import Learner
from megatron_bicc.validation import validate
from megatron_bicc.weights.hf_files import (
    SafetensorsDirectory,
    checked_tensors,
    has_safetensors,
    supported_config,
    warn_of_index,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run reads from files."""

    config: Config
    """Resolved: presets filled in, and the date where the chat template asks for one"""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    heldout: list[Prompt]
    prompt_digests: dict[str, str]
    """Of training and held-out prompts, by what training.resume calls their token ids"""
    collector: Collector
    verifier: Verifier


@dataclass(frozen=True)
class Workers:
    """What a run holds in this process."""

    policy: Policy
    learner: Learner
    engine: Engine


def read_inputs(config: Config) -> Inputs:
    """Reads and checks every setting and file. Raises UserError, one line, for the first mistake."""
    config = check_settings(config)
    verifier = get_verifier(config.reward)
    tokenizer = read_tokenizer(config.model.path)
    check_lengths(config, check_policy(config))
    config = with_date(config, tokenizer, date_of_checkpoint(config))
    prompts = _prompts(config, config.data.train, tokenizer, config.data.instruction, config.data.filter)
    heldout = heldout_prompts(config, config.evaluation.data, tokenizer) if config.evaluation.data else []
    sampler = PromptSampler(len(prompts), config.rollout.prompts_per_step, config.seed)
    digests = {TRAIN_IDS: digest(prompts)} | ({HELD_OUT_IDS: digest(heldout)} if heldout else {})
    collector = Collector(config, prompts, sampler)
    return Inputs(config, tokenizer, prompts, heldout, digests, collector, verifier)


def check_settings(config: Config) -> Config:
    """Checks settings, and that files and the run's directory are there; returns them with presets filled in.

    Raises UserError, one line, for the first mistake.
    """
    validate(config, device.world_size())
    _check_output_dir(config)
    check_reward(config.reward)
    return resolve(config)


def start_workers(inputs: Inputs) -> Workers:
    """Joins the other processes and builds policy, learner and engine. Collective.

    Raises UserError, one line, for an architecture or weights that cannot be used.
    """
    config = inputs.config
    disable_progress_bar()  # the run has one of its own
    device.start_distributed()
    hold_output_dir(config)
    check_agreement(config, inputs.prompt_digests)
    warning = kl_warning(config.loss)
    if warning and device.is_first():
        logger.warning(warning)
    device.watch_hosts(config.parallel.silence_seconds)
    start_model_parallel(config)
    policy = Policy(config)
    warn_of_model(config, policy.hf_config)
    learner = Learner(config, policy, inputs.tokenizer)
    return Workers(policy, learner, make_engine(config, inputs.tokenizer, learner))


def hold_output_dir(config: Config) -> None:
    """Locks the directory that the run writes to. Collective.

    Raises UserError, one line, on every process if another run has it or nothing can be written there.
    """
    error = ""
    if dist.get_rank() == 0:
        try:
            run_lock.hold(config.output_dir)
        except UserError as refusal:
            error = str(refusal)
    for refusal in filter(None, gathered(error)):
        raise UserError(refusal)


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, learner: Learner | None = None) -> Engine:
    """The engine that rollout.engine names. Collective.

    It has the weights of model.path, and takes others where there is a learner for them to be proven against.
    Raises UserError, one line, if a rollout server does not come up or serves another model, or if
    transformers' model could not take the policy's weights.
    """
    if config.rollout.engine == "sglang":
        return SglangEngine(config, tokenizer, learner)
    path, dtype = config.model.path, getattr(torch, config.model.dtype)
    engine = LocalEngine(path, tokenizer, dtype, device.device(), config.rollout.batch_size)
    if learner:
        check_names(engine.model, SafetensorsDirectory(path))
    return engine


def _check_output_dir(config: Config) -> None:
    if not config.output_dir:
        raise UserError("output_dir is empty; name the directory that the run writes to")
    path = Path(config.output_dir)
    try:
        used = (path / "metrics.jsonl").exists()
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    except (OSError, ValueError) as error:
        raise UserError(
            f"output_dir is {config.output_dir[:200]!r}; no such directory can be: {error}"
        ) from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"output_dir is {config.output_dir!r}; {str(nearest)!r} is no directory that can be written to"
        )
    run_lock.refuse_if_alive(config.output_dir)
    if used and not config.checkpoint.resume:
        raise UserError(
            f"output_dir is {config.output_dir}; it already holds a run: choose another directory, "
            "delete it, or go on with that run by checkpoint.resume=true"
        )


def check_policy(config: Config) -> PretrainedConfig:
    """Checks the configuration and the tensors of model.path; returns the configuration.

    A dry run does without weights. Raises UserError, one line, for a model that is not supported or damaged,
    or that a rollout server would read otherwise.
    """
    path = Path(config.model.path)
    hf_config = supported_config(path)
    if has_safetensors(path) or not config.dry_run:
        tensors, _ = checked_tensors(path, hf_config)
        if config.rollout.engine == "sglang" and config.rollout.launch == "spawn":
            check_model_files(path, hf_config, set(tensors.file_of.values()))
    return hf_config


def check_lengths(config: Config, hf_config: PretrainedConfig) -> None:
    """Raises UserError where a rollout can be longer than the model, or its server, has positions for."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    most = engine_positions(config, hf_config)
    if prompt + response > most:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_new_tokens = {prompt} + {response} = {prompt + response}; "
            f"{config.model.path} has {most} positions (max_position_embeddings in config.json, "
            "--context-length of a server): lower the settings"
        )


def engine_positions(config: Config, hf_config: PretrainedConfig) -> int:
    """Tokens of the longest sequence that the model is made for and the rollout engine takes."""
    most = positions(hf_config)
    if config.rollout.engine == "sglang":
        return min(most, server_positions(hf_config, config.rollout))
    return most


def warn_of_model(config: Config, hf_config: PretrainedConfig) -> None:
    """What can be meant but deserves a line each, on the first process."""
    warn_of_index(config.model.path)
    longest, most = config.train.max_sequence_tokens, positions(hf_config)
    if device.is_first() and config.bicc.enabled and longest > most:
        logger.warning(
            "train.max_sequence_tokens is %d; %s has %d positions: longer contexts than that train positions "
            "that it has never seen",
            longest,
            config.model.path,
            most,
        )


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError, one line, where it does not fit the model's config.json, or
    an end token of the directory is none of the vocabulary."""
    hf_config = supported_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # and as many for a damaged tokenizer
        raise UserError(f"model.path is {path}; its tokenizer cannot be read: {first_line(error)}") from error
    if len(tokenizer) > hf_config.vocab_size:
        raise UserError(
            f"model.path is {path}; its tokenizer has {len(tokenizer)} tokens, "
            f"but vocab_size in config.json is {hf_config.vocab_size}: they are of different models"
        )
    if not tokenizer.encode(string.printable, add_special_tokens=False):
        raise UserError(
            f"model.path is {path}; its tokenizer makes no tokens of any text: "
            "tokenizer.json is missing or damaged"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path is {path}; its tokenizer has no eos_token: responses could not end")
    end_token_ids(hf_config, tokenizer, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_date(config: Config, tokenizer: PreTrainedTokenizerBase, first_start: str) -> Config:
    """Fixes the date that the tokenizer's chat template sees, if it asks for one; data.date says which.

    first_start: data.date of what is resumed; empty: nothing is.
    """
    if not asks_for_date(tokenizer):
        return config
    day = config.data.date or first_start or date.today().isoformat()
    if not config.data.date and device.is_first():
        logger.warning(
            "model.path is %s; its chat template asks for today's date: every prompt gets data.date=%s, also "
            "when this is resumed on another day",
            config.model.path,
            day,
        )
    fix_date(tokenizer, date.fromisoformat(day))
    return replace(config, data=replace(config.data, date=day))


def heldout_prompts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of a file, with evaluation.instruction, as many as evaluation.prompts says.

    Raises UserError for a row that no response could answer.
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
