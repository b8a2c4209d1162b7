"""Turns prompts into scored groups: each process generates a share, then all exchange their shares.

Also diagnoses runs in which every reward is 0.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.math_reward import STYLES, Style, final_answer
from megatron_bicc.rewards.registry import Completion, Verifier
from megatron_bicc.rollout.types import Engine, Group, Request, RolloutError, Sample, Sampling


def sample_seed(*parts: int | str) -> int:
    """Returns a seed in [0, 2**63) from the identity of a sample; independent of the number of processes."""
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
    """Samples per prompt"""

    def collect(self, prompts: list[Prompt], seed: tuple[int | str, ...]) -> list[Group]:
        """Returns a group for every prompt, in their order, the same on every process. Collective.

        A sample depends on the weights, its prompt, its index in the group and `seed`. Raises RolloutError or
        UserError on every process if the engine or the verifier of one does.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = prompts[rank::world]
        requests = [request for prompt in mine for request in self.requests(prompt, seed)]
        with raised_on_all_ranks(RolloutError, UserError):
            groups = self.scored(mine, self.engine.generate(requests, self.sampling) if requests else [])
        shares = exchange(dict(zip(range(rank, len(prompts), world), groups, strict=True)), prompts)
        return [shares[place] for place in range(len(prompts))]

    def requests(self, prompt: Prompt, seed: tuple[int | str, ...]) -> list[Request]:
        """Returns the engine's requests for one group."""
        return [
            Request(prompt.token_ids, sample_seed(*seed, prompt.index, i)) for i in range(self.group_size)
        ]

    def scored(self, prompts: list[Prompt], samples: list[Sample]) -> list[Group]:
        """Scores samples, given group by group, and returns the prompts' groups.

        Raises RolloutError for a log-prob or reward that is not finite, even in a group without contrast: the
        policy or the verifier is broken. Raises UserError for an engine that breaks its protocol, and for a
        user's reward function that does.
        """
        if not prompts:  # transformers would decode an empty list as one sample without tokens
            return []
        _check_protocol(samples, len(prompts) * self.group_size)
        if self.sampling.routing:
            for place, sample in enumerate(samples):
                of_prompt = len(prompts[place // self.group_size].token_ids) - 1
                _check_routing(sample, place, None if place % self.group_size else of_prompt)
        texts = self.tokenizer.batch_decode([_without_end(s) for s in samples], skip_special_tokens=True)
        groups = []
        for i, prompt in enumerate(prompts):
            own = slice(i * self.group_size, (i + 1) * self.group_size)
            group = Group(prompt, samples[own], texts[own], self._rewards(prompt, texts[own]))
            for j, sample in enumerate(group.samples):
                _check(sample, group.rewards[j], f"sample {j} of the prompt of row {prompt.index + 1}")
            groups.append(group)
        return groups

    def _rewards(self, prompt: Prompt, texts: list[str]) -> np.ndarray:
        """Returns the rewards of a group's responses: float32 [R]. Raises UserError for a user's function."""
        about = (prompt.ground_truth, prompt.data_source, prompt.extra, prompt.index + 1)
        begun = prompt.begun_answer
        return self.verifier([Completion(prompt.messages, begun + text, *about) for text in texts])


def _without_end(sample: Sample) -> np.ndarray:
    """Returns the sample's tokens without its end token, which need not be a special token: int32."""
    return sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids


def _check_protocol(samples: list[Sample], requested: int) -> None:
    """Raises UserError if an engine did not return one whole Sample per request: rollouts would be trained
    with another prompt, or not at all."""
    if len(samples) != requested:
        raise UserError(
            f"rollout.engine: generate returned {len(samples)} samples for {requested} requests; it must "
            "return one per request, in order"
        )
    for place, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise UserError(
                f"rollout.engine: generate returned a {type(sample).__name__} for request {place}; it must "
                "return megatron_bicc.rollout.types.Sample"
            )
        if len(sample.token_ids) != len(sample.log_probs) or not len(sample.token_ids):
            raise UserError(
                f"rollout.engine: sample {place} has {len(sample.token_ids)} tokens and "
                f"{len(sample.log_probs)} log-probs; it needs one log-prob per token, and at least one token"
            )


def _check_routing(sample: Sample, place: int, of_prompt: int | None) -> None:
    """Raises UserError if a sample lacks the routing of a token that was read to sample it.

    of_prompt: tokens whose routing the first sample of a group must have; None: it is another one.
    """
    rows = 0 if sample.experts is None else len(sample.experts)
    if rows != len(sample.token_ids):
        raise UserError(
            f"rollout.engine: sample {place} has {len(sample.token_ids)} tokens and experts of {rows}; "
            "model.routing_replay=engine needs those of every token"
        )
    prompt_rows = 0 if sample.prompt_experts is None else len(sample.prompt_experts)
    if of_prompt is not None and prompt_rows != of_prompt:
        raise UserError(
            f"rollout.engine: sample {place} has prompt_experts of {prompt_rows} tokens; "
            f"model.routing_replay=engine needs those of the prompt's {of_prompt} before the last"
        )


def _check(sample: Sample, reward: float, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(sample.log_probs))
    if len(bad):
        raise RolloutError(
            f"{where}: the engine's log-prob of token {bad[0]} is {sample.log_probs[bad[0]]}: its weights "
            "are not finite, or the model's numbers overflow in their type"
        )
    if not np.isfinite(reward):
        raise RolloutError(f"{where}: the verifier's reward is {reward}; it must be finite")


def exchange(own: dict[int, Group], prompts: Sequence[Prompt] | Mapping[int, Prompt]) -> dict[int, Group]:
    """Returns the groups of all processes by the index, or key, of their prompt in `prompts`. Collective.

    Prompts are not sent, as every process has them all.
    """
    sent = {place: (group.samples, group.texts, group.rewards) for place, group in own.items()}
    return {
        place: Group(prompts[place], *parts) for share in gathered(sent) for place, parts in share.items()
    }


STEPS = 3
"""Consecutive steps with rewards of 0 only, after which the likely reason is reported"""


class ZeroRewardWatch:
    """Reports the likely reason when every reward has been 0 for several consecutive steps."""

    def __init__(self, style: Style | None, enabled: bool) -> None:
        """style: rewards.registry.answer_style. enabled: on one process only."""
        self._style, self._enabled = style, enabled
        self._zero: list[list[Group]] = []
        self._had_rewards = False

    def see(self, groups: list[Group]) -> str | None:
        """Adds a step's groups. Returns the likely reason in one line, once per series of such steps."""
        if not self._enabled:
            return None
        if _has_reward(groups):
            self._zero, self._had_rewards = [], True
            return None
        if len(self._zero) == STEPS:  # reported already
            return None
        self._zero.append(groups)
        if len(self._zero) < STEPS:
            return None
        why = f"in the last {STEPS} steps {why_all_zero(sum(self._zero, []), self._style)}"
        if self._had_rewards:
            why += (
                "; there were rewards before: if the policy has collapsed, resume from an earlier checkpoint "
                "with a lower optimizer.lr"
            )
        return why


def _has_reward(groups: list[Group]) -> bool:
    return any(group.rewards.any() for group in groups)


def why_all_zero(groups: list[Group], style: Style | None) -> str | None:
    """Returns the likely reason in one line; None if any reward is not 0 or there are no groups.

    style: format of final answers that the verifier reads; None for a user's function.
    """
    if not groups or _has_reward(groups):
        return None
    texts = [group.prompt.begun_answer + text for group in groups for text in group.texts]
    cut = sum(sample.finish_reason == "length" for group in groups for sample in group.samples)
    if style is None:
        return (
            f"all {len(texts)} rewards are 0: {cut / len(texts):.0%} of the responses were cut off at "
            f"rollout.max_new_tokens; one ends in {texts[0][-60:]!r}; check the function that "
            "reward.verifier names"
        )
    unread = [text for text in texts if not final_answer(text, style)]
    return (
        f"all {len(texts)} rewards are 0: {len(unread) / len(texts):.0%} of the responses have no answer "
        f"that reward.answer={style} reads, {cut / len(texts):.0%} were cut off at rollout.max_new_tokens; "
        f"one ends in {(unread or texts)[0][-60:]!r}; {_remedy(texts, unread, cut)}"
    )


def _remedy(texts: list[str], unread: list[str], cut: int) -> str:
    if 2 * len(unread) >= len(texts):
        reads = {name: sum(bool(final_answer(text, name)) for text in unread) for name in STYLES}
        best = max(reads, key=lambda name: reads[name])
        if 2 * cut >= len(texts):
            return "raise rollout.max_new_tokens"
        if 2 * reads[best] >= len(unread):
            return f"set reward.answer={best}, or ask for another form of answer by data.instruction"
        return "ask for a marked answer, such as \\boxed{X}, by data.instruction"
    return "the answers are read and wrong: train on easier prompts, or check the ground truths"
