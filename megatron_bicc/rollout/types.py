"""Requests and samples, and the protocol that every rollout engine implements (docs/extending.md).

Shape suffixes: P prompt tokens, T response tokens; R rollouts of a group.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from megatron_bicc.data.prompts import Prompt
from megatron_bicc.weights.verify import TokenSequence


class RolloutError(Exception):
    """The rollouts of a step failed, for example because no server answers. One line: what and why."""


@dataclass(frozen=True)
class Request:
    """One sample to generate."""

    token_ids: np.ndarray
    """int32 [P], chat template included"""
    seed: int
    """The same weights, prompt, settings and seed give the same tokens, where the engine supports it."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one call. The whole distribution is sampled: no top-p, top-k or penalties."""

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One response as tokens."""

    token_ids: np.ndarray
    """int32 [T], including the end token if one was sampled"""
    log_probs: np.ndarray
    """float32 [T]: log-prob of each token under the engine's softmax(logits / temperature)"""
    finish_reason: Literal["stop", "length"]
    """stop: the last token is an end token; length: cut off at max_new_tokens"""
    weight_version: int
    """Version of the weights that sampled it"""


@dataclass(frozen=True)
class Group:
    """A prompt and its scored samples."""

    prompt: Prompt
    samples: list[Sample]
    texts: list[str]
    """The decoded responses without end token and special tokens, as they were scored"""
    rewards: np.ndarray
    """float32 [R]"""


def unscored(sequences: Iterable[TokenSequence]) -> list[Group]:
    """Returns each sequence as a group of one sample without text or reward, for log-probs only."""
    return [
        Group(
            Prompt(0, [], sequence.prompt, "", "", {}),
            [Sample(sequence.response, np.zeros(len(sequence.response), np.float32), "length", 0)],
            [""],
            np.zeros(1, np.float32),
        )
        for sequence in sequences
    ]


@runtime_checkable
class Engine(Protocol):
    """Generates samples with the policy's weights. Every process of the run has an engine of its own.

    `rollout.engine=package.module:Class` or `file.py:Class` names a class of yours: it is called as
    Class(config, tokenizer) on every process, after torch.distributed has started, and must have the weights
    of model.path then. Subclass Engine to inherit the methods below that do nothing.

    How it gets new weights (weights.sync.make_weight_sync): either it has a method
    `load_weights(tensors: Iterable[tuple[str, Tensor]], version: int) -> None`, which reads the iterator to
    its end: every parameter once, whole, under its Hugging Face name. That method is collective: each tensor
    is gathered from the policy's ranks as it is read, so every process must read all of them. Or it has an
    attribute `pool: sglang.pool.ServerPool`, whose servers the weight sync then updates. An engine with
    neither can only evaluate.
    """

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Returns one sample per request, in the requests' order. Not collective.

        Requests of one group are adjacent and have the same prompt. Sample.weight_version must be the version
        that came with the weights. Raises RolloutError, on this process alone, if samples cannot be had: the
        caller raises it on every process.
        """

    def memory_released(self) -> AbstractContextManager[None]:
        """Returns a context in which training may use the memory that the engine has on the policy's devices.

        After it the engine need not have weights: a weight sync follows. By default nothing is released.
        """
        return nullcontext()

    def counts(self) -> dict[str, float]:
        """Returns metrics of all processes since the last call, such as retried requests. Collective."""
        return {}

    def close(self) -> None:
        """Ends what the engine started. Called once, after the weight sync is closed."""


class Stream(Protocol):
    """Groups of samples that are submitted one by one and come back as they finish."""

    def submit(self, key: int, requests: list[Request]) -> None:
        """Submits the requests of one prompt; `next` returns their samples under this key. Does not block."""

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """Returns key and samples of a finished group, or None if none finishes within `seconds`.

        seconds: None waits without limit. Raises RolloutError for a group that failed.
        """

    def outstanding(self) -> int:
        """Returns the number of submitted groups that `next` has not returned."""


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that generates groups while others are scored, for dynamic sampling."""

    def stream(self, sampling: Sampling) -> AbstractContextManager[Stream]:
        """Returns a context with a Stream; unfinished groups are aborted when the context ends."""
