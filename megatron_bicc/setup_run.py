"""Everything that a run is made of, checked and built before the first step."""

import os
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_bicc import platform
from megatron_bicc.agreement import check_agreement
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data import Prompt, PromptSampler, load_prompts
from megatron_bicc.errors import first_line
from megatron_bicc.policy.hf_files import SafetensorsDirectory
from megatron_bicc.policy.policy import Policy, start_model_parallel
from megatron_bicc.rewards import Verifier, check_threshold, get_verifier, unscorable
from megatron_bicc.rollout.dynamic import Collector
from megatron_bicc.rollout.local import LocalEngine, check_names
from megatron_bicc.rollout.sglang.engine import SglangEngine
from megatron_bicc.rollout.types import Engine
from megatron_bicc.training.learner import Learner
from megatron_bicc.validation import validate


@dataclass(frozen=True)
class Inputs:
    """What a run reads from files."""

    config: Config
    """Resolved: presets filled in"""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    heldout: list[Prompt]
    collector: Collector
    verifier: Verifier


@dataclass(frozen=True)
class Workers:
    """What a run holds in this process."""

    policy: Policy
    learner: Learner
    engine: Engine


def read_inputs(config: Config) -> Inputs:
    """Reads and checks every setting and file. Raises ValueError, one line, for the first mistake."""
    config = check_settings(config)
    verifier = get_verifier(config.reward.verifier)
    tokenizer = read_tokenizer(config.model.path)
    prompts = _prompts(config, config.data.train, tokenizer)
    heldout = heldout_prompts(config, config.evaluation.data, tokenizer) if config.evaluation.data else []
    sampler = PromptSampler(len(prompts), config.rollout.prompts_per_step, config.seed)
    return Inputs(config, tokenizer, prompts, heldout, Collector(config, prompts, sampler), verifier)


def check_settings(config: Config) -> Config:
    """Checks settings, and that files and the run's directory are there; returns them with presets filled in.

    Raises ValueError, one line, for the first mistake.
    """
    validate(config, platform.world_size())
    _check_output_dir(config)
    check_threshold(config.reward.verifier, config.reward.threshold)
    return resolve(config)


def start_workers(inputs: Inputs) -> Workers:
    """Joins the other processes and builds policy, learner and engine. Collective.

    Raises ValueError, one line, for an architecture or weights that cannot be used.
    """
    config = inputs.config
    disable_progress_bar()  # the run has one of its own
    platform.start_distributed()
    check_agreement(config)
    platform.watch_hosts(config.parallel.silence_seconds)
    start_model_parallel(config)
    policy = Policy(config)
    learner = Learner(config, policy, inputs.tokenizer)
    return Workers(policy, learner, make_engine(config, inputs.tokenizer, learner))


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, learner: Learner | None = None) -> Engine:
    """The engine that rollout.engine names. Collective.

    It has the weights of model.path, and takes others where there is a learner for them to be proven against.
    Raises ValueError, one line, if a rollout server does not come up or serves another model, or if
    transformers' model could not take the policy's weights.
    """
    if config.rollout.engine == "sglang":
        return SglangEngine(config, tokenizer, learner)
    path, dtype = config.model.path, getattr(torch, config.model.dtype)
    engine = LocalEngine(path, tokenizer, dtype, platform.device(), config.rollout.batch_size)
    if learner:
        check_names(engine.model, SafetensorsDirectory(path))
    return engine


def _check_output_dir(config: Config) -> None:
    if not config.output_dir:
        raise ValueError("output_dir is empty; name the directory that the run writes to")
    path = Path(config.output_dir)
    try:
        used = (path / "metrics.jsonl").exists()
        nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"output_dir is {config.output_dir[:200]!r}; no such directory can be: {error}"
        ) from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(
            f"output_dir is {config.output_dir!r}; {str(nearest)!r} is no directory that can be written to"
        )
    if used and not config.checkpoint.resume:
        raise ValueError(
            f"output_dir is {config.output_dir}; it already holds a run: choose another directory, "
            "delete it, or go on with that run by checkpoint.resume=true"
        )


def read_hf_config(path: str) -> PretrainedConfig:
    """The model's config.json. Raises ValueError, one line, if it is no model's configuration."""
    try:
        hf_config = AutoConfig.from_pretrained(path)
        hf_config.vocab_size  # noqa: B018 - one without a vocabulary is no language model's
        return hf_config
    except Exception as error:  # transformers raises many kinds for a damaged configuration
        raise ValueError(
            f"model.path is {path}; its config.json cannot be used: {first_line(error)}"
        ) from error


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError, one line, where it does not fit the model's config.json."""
    vocab_size = read_hf_config(path).vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # and as many for a damaged tokenizer
        raise ValueError(
            f"model.path is {path}; its tokenizer cannot be read: {first_line(error)}"
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"model.path is {path}; its tokenizer has {len(tokenizer)} tokens, "
            f"but vocab_size in config.json is {vocab_size}: they are of different models"
        )
    if not tokenizer.encode(string.printable, add_special_tokens=False):
        raise ValueError(
            f"model.path is {path}; its tokenizer makes no tokens of any text: "
            "tokenizer.json is missing or damaged"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path is {path}; its tokenizer has no eos_token: responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def heldout_prompts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of a file, with evaluation.instruction, as many as evaluation.prompts says.

    Raises ValueError for a row that no response could answer.
    """
    prompts = _prompts(config, path, tokenizer, config.evaluation.instruction)
    return prompts[: config.evaluation.prompts or None]


def _prompts(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, instruction: str = ""
) -> list[Prompt]:
    data, reward = config.data, config.reward
    prompts = load_prompts(path, tokenizer, data.max_prompt_tokens, data.overlong_prompts, instruction)
    truths = [prompt.ground_truth for prompt in prompts]
    for i in unscorable(reward.verifier, truths, reward.threshold):
        raise ValueError(
            f"{path}, row {prompts[i].index + 1}: no response can be right: "
            f"reward.verifier={reward.verifier} does not even accept the ground truth itself, "
            f"{truths[i][:60]!r}; correct it or remove the row"
        )
    return prompts
