"""Turns prompts into scored groups: each process generates a share, then all exchange their shares.

Also diagnoses runs in which every reward is 0.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.math_reward import STYLES, Style, final_answer
from megatron_bicc.rewards.scorer import Scorer
from megatron_bicc.rewards.types import Completion, Scores
from megatron_bicc.rollout.types import (
    Engine,
    Group,
    Request,
    RolloutError,
    Sample,
    Sampling,
    Stream,
    StreamingEngine,
)

LOOK_S = 0.02
"""Seconds between two looks at scores while the engine generates"""


def sample_seed(*parts: int | str) -> int:
    """Returns a seed in [0, 2**63) from the identity of a sample; independent of the number of processes."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class GroupSampler:
    """Samples groups with an engine and scores them."""

    engine: Engine
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    group_size: int
    """Samples per prompt"""
    drop_failed: bool = False
    """Leave responses that could not be scored out of their group; else they stay, with a reward of 0"""

    def collect(self, prompts: list[Prompt], seed: tuple[int | str, ...]) -> list[Group]:
        """Returns a group for every prompt, in their order, the same on every process. Collective.

        A sample depends on the weights, its prompt, its index in the group and `seed`. An engine that streams
        generates other groups while one is scored. Raises RolloutError or UserError on every process if the
        engine or the reward function of one does.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = dict(list(enumerate(prompts))[rank::world])
        with raised_on_all_ranks(RolloutError, UserError):
            if isinstance(self.engine, StreamingEngine):
                groups = self._streamed(mine, seed)
            else:
                requests = [request for prompt in mine.values() for request in self.requests(prompt, seed)]
                samples = self.engine.generate(requests, self.sampling) if requests else []
                groups = dict(zip(mine, self.scored(list(mine.values()), samples), strict=True))
        shares = exchange(groups, prompts)
        return [shares[place] for place in range(len(prompts))]

    def _streamed(self, prompts: dict[int, Prompt], seed: tuple[int | str, ...]) -> dict[int, Group]:
        groups: dict[int, Group] = {}
        total = len(prompts) * self.group_size
        with (
            self.stream() as stream,
            tqdm(total=total, desc="rollouts", leave=False, disable=device.quiet()) as bar,
        ):
            for place, prompt in prompts.items():
                stream.submit(place, prompt, self.requests(prompt, seed))
            while stream.outstanding():
                place, groups[place] = stream.next(None)
                bar.update(self.group_size)
        return groups

    @contextmanager
    def stream(self) -> "Iterator[ScoredStream]":
        """Yields a stream of scored groups, of an engine that streams; unfinished ones are aborted."""
        with self.engine.stream(self.sampling) as stream:
            yield ScoredStream(self, stream)

    def requests(self, prompt: Prompt, seed: tuple[int | str, ...]) -> list[Request]:
        """Returns the engine's requests for one group."""
        return [
            Request(prompt.token_ids, sample_seed(*seed, prompt.index, i)) for i in range(self.group_size)
        ]

    def scored(self, prompts: list[Prompt], samples: list[Sample]) -> list[Group]:
        """Scores samples, given group by group, and returns the prompts' groups.

        Raises as `submit` and the futures that it returns.
        """
        return [future.result() for future in self.submit(prompts, samples)]

    def submit(self, prompts: list[Prompt], samples: list[Sample]) -> "list[Future[Group]]":
        """Starts to score samples, given group by group; returns the prompts' groups to be.

        Raises RolloutError for a log-prob that is not finite, even in a group without contrast: the policy is
        broken. Raises UserError for an engine that breaks its protocol; a future does for a response that
        cannot be scored, with reward.on_error=fail.
        """
        if not prompts:  # transformers would decode an empty list as one sample without tokens
            return []
        _check_protocol(samples, len(prompts) * self.group_size)
        if self.sampling.routing:
            for place, sample in enumerate(samples):
                of_prompt = len(prompts[place // self.group_size].token_ids) - 1
                _check_routing(sample, place, None if place % self.group_size else of_prompt)
        texts = self.tokenizer.batch_decode([_without_end(s) for s in samples], skip_special_tokens=True)
        futures = []
        for i, prompt in enumerate(prompts):
            own = slice(i * self.group_size, (i + 1) * self.group_size)
            for j, sample in enumerate(samples[own]):
                _check(sample, f"sample {j} of the prompt of row {prompt.index + 1}")
            futures.append(self._group(prompt, samples[own], texts[own]))
        return futures

    def _group(self, prompt: Prompt, samples: list[Sample], texts: list[str]) -> "Future[Group]":
        about = (prompt.ground_truth, prompt.data_source, prompt.extra, prompt.index + 1)
        scores = self.scorer.submit(
            [
                Completion(
                    prompt.messages,
                    prompt.begun_answer + text,
                    *about,
                    sample.token_ids,
                    sample.finish_reason,
                )
                for sample, text in zip(samples, texts, strict=True)
            ]
        )
        group: Future[Group] = Future()

        def finish(scores: "Future[Scores]") -> None:
            try:
                made = _scored_group(prompt, samples, texts, scores.result())
                group.set_result(without_failed(made, scores.result().failed) if self.drop_failed else made)
            except BaseException as error:  # raised where the group is taken
                group.set_exception(error)

        scores.add_done_callback(finish)
        return group


def _scored_group(prompt: Prompt, samples: list[Sample], texts: list[str], scores: Scores) -> Group:
    return Group(
        prompt,
        samples,
        texts,
        scores.rewards,
        scores.metrics if any(scores.metrics) else [],
        scores.feedback if any(scores.feedback) else [],
        int(scores.failed.sum()),
    )


def without_failed(group: Group, failed: np.ndarray) -> Group:
    """Returns a group without the responses that could not be scored; keeps their number. failed: bool [R]"""
    if not failed.any():
        return group
    kept = np.flatnonzero(~failed)
    samples = [group.samples[i] for i in kept]
    if samples and samples[0].prompt_experts is None:  # the first one has those of the group
        samples[0] = replace(samples[0], prompt_experts=group.samples[0].prompt_experts)
    return replace(
        group,
        samples=samples,
        texts=[group.texts[i] for i in kept],
        rewards=group.rewards[kept],
        metrics=[group.metrics[i] for i in kept] if group.metrics else [],
        feedback=[group.feedback[i] for i in kept] if group.feedback else [],
    )


class ScoredStream:
    """A stream whose groups are scored while the engine generates others; as rollout.types.Stream."""

    def __init__(self, sampler: GroupSampler, stream: Stream) -> None:
        self._sampler, self._stream = sampler, stream
        self._prompts: dict[int, Prompt] = {}
        """Of the groups that the engine generates"""
        self._scoring: dict[int, Future[Group]] = {}

    def submit(self, key: int, prompt: Prompt, requests: list[Request]) -> None:
        """Submits the requests of one prompt; `next` returns their group under this key. Does not block."""
        self._prompts[key] = prompt
        self._stream.submit(key, requests)

    def next(self, seconds: float | None) -> tuple[int, Group] | None:
        """Returns key and group that have been scored, or None if none is within `seconds`.

        seconds: None waits without limit. Raises RolloutError or UserError for a group that failed.
        """
        left, end = seconds, None if seconds is None else time.monotonic() + seconds
        while True:
            done = next((key for key, group in self._scoring.items() if group.done()), None)
            if done is not None:
                return done, self._scoring.pop(done).result()
            if not self._stream.outstanding():
                if not wait(self._scoring.values(), left, FIRST_COMPLETED).done:
                    return None
                continue
            # while groups are scored, both are looked at in turn
            look = min(LOOK_S, LOOK_S if left is None else left) if self._scoring else left
            if finished := self._stream.next(look):
                key, samples = finished
                (self._scoring[key],) = self._sampler.submit([self._prompts.pop(key)], samples)
            elif look == left:
                return None
            left = None if end is None else max(0.0, end - time.monotonic())

    def abort(self, key: int) -> None:
        """Drops a submitted group: `next` never returns it. Does not block."""
        if self._scoring.pop(key, None) is None:
            del self._prompts[key]
            self._stream.abort(key)

    def outstanding(self) -> int:
        """Returns the number of submitted groups that `next` has not returned and that were not aborted."""
        return self._stream.outstanding() + len(self._scoring)


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


def _check(sample: Sample, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(sample.log_probs))
    if len(bad):
        raise RolloutError(
            f"{where}: the engine's log-prob of token {bad[0]} is {sample.log_probs[bad[0]]}: its weights "
            "are not finite, or the model's numbers overflow in their type"
        )


def exchange(own: dict[int, Group], prompts: Sequence[Prompt] | Mapping[int, Prompt]) -> dict[int, Group]:
    """Returns the groups of all processes by the index, or key, of their prompt in `prompts`. Collective.

    Prompts are not sent, as every process has them all.
    """
    sent = {place: replace(group, prompt=None) for place, group in own.items()}
    return {
        place: replace(group, prompt=prompts[place])
        for share in gathered(sent)
        for place, group in share.items()
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

    style: format of final answers that the reward function reads; None if it reads none.
    """
    if not groups or _has_reward(groups):
        return None
    texts = [group.prompt.begun_answer + text for group in groups for text in group.texts]
    cut = sum(sample.finish_reason == "length" for group in groups for sample in group.samples)
    if style is None:
        return (
            f"all {len(texts)} rewards are 0: {cut / len(texts):.0%} of the responses were cut off at "
            f"rollout.max_new_tokens; one ends in {texts[0][-60:]!r}; check the function that "
            "reward.function names"
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
