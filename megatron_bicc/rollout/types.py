"""What an engine is asked for, what it answers, and the protocol that every engine keeps."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from megatron_bicc.data.prompts import Prompt


class RolloutError(Exception):
    """A step's rollouts cannot be had, such as from an engine that does not answer. One line: why, where."""


@dataclass(frozen=True)
class Request:
    """One sample to generate."""

    token_ids: np.ndarray
    """int32 [prompt length], chat template included"""
    seed: int
    """Fixes the sample: the same weights, prompt, settings and seed give the same tokens."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one call."""

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One response, in tokens."""

    token_ids: np.ndarray
    """int32 [length], the end token (policy.end_tokens) included where one was sampled"""
    log_probs: np.ndarray
    """float32 [length]: log-prob of each token under the engine's softmax(logits / temperature)"""
    finish_reason: Literal["stop", "length"]
    """Whether the last token is an end token, or the sample was cut at max_new_tokens"""
    weight_version: int
    """Version of the weights that sampled it"""


@dataclass(frozen=True)
class Group:
    """A prompt and its G scored samples."""

    prompt: Prompt
    samples: list[Sample]
    texts: list[str]
    """The responses, decoded, without their end token and special tokens: what was scored"""
    rewards: np.ndarray
    """float32 [G]"""


class Engine(Protocol):
    """Generates samples with the policy's weights."""

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """One sample a request, in the requests' order. Raises RolloutError."""

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes whole tensors under their Hugging Face names, streamed. Every parameter must come once."""

    def memory_released(self) -> AbstractContextManager[None]:
        """Inside it training may use the memory of the devices; after it new weights must come."""

    def counts(self) -> dict[str, float]:
        """What went wrong since the last call and was made good, as metrics of all processes. Collective."""

    def close(self) -> None:
        """Ends what the engine started."""


class Stream(Protocol):
    """Groups of samples that are asked for one by one and come back as they are finished."""

    def ask(self, key: int, requests: list[Request]) -> None:
        """Asks for the samples of one prompt; `next` gives them under this key. Does not wait."""

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """The key and the samples of a group that is finished; None if none is within so many seconds.

        seconds: None waits for as long as it takes. Raises RolloutError for a group that cannot be had.
        """

    def outstanding(self) -> int:
        """Groups asked for that `next` has not given."""


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that can work on groups while others are scored."""

    def stream(self, sampling: Sampling) -> AbstractContextManager[Stream]:
        """Groups one by one; what is not finished when the context ends is aborted."""
