"""Requests and samples, and the protocol that every rollout engine implements (docs/extending.md).

Shape suffixes: P prompt tokens, T response tokens; R rollouts of a group.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from megatron_bicc.data.prompts import Prompt
from megatron_bicc.weights.verify import TokenGroup


class RolloutError(Exception):
    """Sampling failed, for example because no server answers. One line: what and why."""


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
    routing: bool = False
    """Return Sample.experts (model.routing_replay=engine)"""


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
    """Version of the weights that sampled it; its first token, if they were several"""
    experts: np.ndarray | None = None
    """model.families.experts_type [T, layers, experts per token], with Sampling.routing: the experts of the
    tokens that were read to sample each token: of the prompt's last, then of the response but its last"""
    prompt_experts: np.ndarray | None = None
    """The same [P - 1, ...] of the prompt's other tokens; a group's first sample has them"""
    versions: np.ndarray | None = None
    """int32 [T]: version of the weights that sampled each token; None: all are weight_version"""

    def token_versions(self) -> np.ndarray:
        """Returns `versions`, also where it is None."""
        if self.versions is None:
            return np.full(len(self.token_ids), self.weight_version, np.int32)
        return self.versions


@dataclass(frozen=True)
class Group:
    """A prompt and its scored samples."""

    prompt: Prompt
    samples: list[Sample]
    texts: list[str]
    """The decoded responses without end token and special tokens, as they were scored"""
    rewards: np.ndarray
    """float32 [R]"""


def unscored(groups: Iterable[TokenGroup]) -> list[Group]:
    """Returns token groups as Groups without log-probs, texts and rewards, for Learner.log_probs."""
    return [
        Group(
            Prompt(0, [], group.prompt, "", "", {}),
            [Sample(ids, np.zeros(len(ids), np.float32), "length", 0) for ids in group.responses],
            [""] * len(group.responses),
            np.zeros(len(group.responses), np.float32),
        )
        for group in groups
    ]


@runtime_checkable
class Engine(Protocol):
    """Generates samples with the policy's weights. Every process of the run has its own engine.

    `rollout.engine=package.module:Class` or `file.py:Class` names a user's class: it is called as
    Class(config, tokenizer) on every process, after torch.distributed has started, and must have the weights
    of model.path then. Subclass Engine to inherit the methods below that do nothing.

    An engine gets new weights in one of two ways (weights.sync.make_weight_sync): either it has a method
    `load_weights(tensors: Iterable[tuple[str, Tensor]], version: int) -> None`, which reads the iterator to
    its end: every parameter once, whole, under its Hugging Face name. That method is collective: each tensor
    is gathered from the policy's ranks as it is read, so every process must read all of them. Or it has an
    attribute `pool: sglang.pool.ServerPool`, whose servers the weight sync then updates. An engine with
    neither can only evaluate.
    """

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Returns one sample per request, in the requests' order. Not collective.

        Requests of one group are adjacent and have the same prompt. Sample.weight_version must be the version
        passed with the weights. Raises RolloutError, on this process alone, if sampling fails: the caller
        raises it on every process.
        """

    def memory_released(self) -> AbstractContextManager[None]:
        """Returns a context in which training may use the engine's memory on the policy's devices.

        Entered and left by every process, for rollout.colocate. After it the engine may lack weights: a
        weight sync follows. By default nothing is released.
        """
        return nullcontext()

    def counts(self) -> dict[str, float]:
        """Returns metrics of all processes since the last call, such as retried requests. Collective."""
        return {}

    def close(self) -> None:
        """Releases everything that the engine started. Called once, after the weight sync is closed."""


class Stream(Protocol):
    """Groups of samples that are submitted one by one and returned as they finish."""

    def submit(self, key: int, requests: list[Request]) -> None:
        """Submits the requests of one prompt; `next` returns their samples under this key. Does not block."""

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """Returns key and samples of a finished group, or None if none finishes within `seconds`.

        seconds: None waits without limit. Raises RolloutError for a group that failed.
        """

    def abort(self, key: int) -> None:
        """Drops a submitted group: `next` never returns it, even if it has just finished. Does not block."""

    def outstanding(self) -> int:
        """Returns the number of submitted groups that `next` has not returned and that were not aborted."""


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that generates groups while others are scored, for dynamic sampling."""

    def stream(self, sampling: Sampling) -> AbstractContextManager[Stream]:
        """Returns a context with a Stream; unfinished groups are aborted when the context ends."""
