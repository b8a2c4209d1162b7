"""From prompts to scored groups: every process generates its share, then all hold all groups."""

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_bicc.data import Prompt
from megatron_bicc.platform.gather import gathered
from megatron_bicc.rewards import Verifier
from megatron_bicc.rollout.types import Engine, Group, Request, RolloutError, Sample, Sampling

Outcome = TypeVar("Outcome")


def sample_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from what identifies a sample: the same whatever the number of processes."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class GroupSampler:
    """Samples groups with an engine and scores them."""

    engine: Engine
    verifier: Verifier
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    group_size: int
    """G: samples of each prompt"""

    def collect(self, prompts: list[Prompt], seed: tuple[int | str, ...]) -> list[Group]:
        """A group of every prompt, in the prompts' order, the same on every process. Collective.

        A sample depends on the weights, its prompt, its place in the group and `seed`. Raises RolloutError
        on every process if the engine of one does.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = prompts[rank::world]
        requests = [request for prompt in mine for request in self.requests(prompt, seed)]
        outcome: list[Group] | RolloutError
        try:
            outcome = self.scored(mine, self.engine.generate(requests, self.sampling) if requests else [])
        except RolloutError as error:
            outcome = error
        shares = exchange(outcome)
        return [shares[i % world][i // world] for i in range(len(prompts))]

    def requests(self, prompt: Prompt, seed: tuple[int | str, ...]) -> list[Request]:
        """What the engine is asked for one group."""
        return [
            Request(prompt.token_ids, sample_seed(*seed, prompt.index, i)) for i in range(self.group_size)
        ]

    def scored(self, prompts: list[Prompt], samples: list[Sample]) -> list[Group]:
        """The groups of prompts, from their samples one group after the other.

        A process may have no prompts: there is then nothing to decode or to score. Raises RolloutError for a
        log-prob or a reward that is not finite: whether or not anything is learned from the group, the policy
        or the verifier is of no more use.
        """
        if not prompts:  # transformers would decode no samples at all as one sample without tokens
            return []
        texts = self.tokenizer.batch_decode([_without_end(s) for s in samples], skip_special_tokens=True)
        asked = [prompt for prompt in prompts for _ in range(self.group_size)]
        answers = [prompt.begun_answer + text for prompt, text in zip(asked, texts, strict=True)]
        rewards = self.verifier(answers, [prompt.ground_truth for prompt in asked])
        for i in range(len(samples)):
            row = prompts[i // self.group_size].index + 1
            _check(samples[i], rewards[i], f"sample {i % self.group_size} of the prompt of row {row}")
        groups = []
        for i, prompt in enumerate(prompts):
            own = slice(i * self.group_size, (i + 1) * self.group_size)
            groups.append(Group(prompt, samples[own], texts[own], rewards[own]))
        return groups


def _without_end(sample: Sample) -> np.ndarray:
    """int32: the sample's tokens but for the one that ended it, which need not be a special token."""
    return sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids


def _check(sample: Sample, reward: float, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(sample.log_probs))
    if len(bad):
        raise RolloutError(
            f"{where}: the engine's log-prob of token {bad[0]} is {sample.log_probs[bad[0]]}: its weights "
            "are not finite, or the model's numbers overflow in their type"
        )
    if not np.isfinite(reward):
        raise RolloutError(f"{where}: the verifier's reward is {reward}; it must be finite")


def exchange(outcome: Outcome | RolloutError) -> list[Outcome]:
    """Every process's outcome, by rank. Collective; raises on every process the first error among them."""
    outcomes = gathered(outcome)
    for each in outcomes:
        if isinstance(each, RolloutError):
            raise each
    return outcomes
