"""From prompts to scored groups: every process generates its share, then all hold all groups."""

import hashlib

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_bicc.data import Prompt
from megatron_bicc.platform.gather import gathered
from megatron_bicc.rewards import Verifier
from megatron_bicc.rollout.types import Engine, Group, Request, RolloutError, Sample, Sampling


def sample_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from what identifies a sample: the same whatever the number of processes."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def collect_groups(
    prompts: list[Prompt],
    engine: Engine,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    group_size: int,
    seed: tuple[int | str, ...],
) -> list[Group]:
    """G scored samples of every prompt, in the prompts' order, the same on every process. Collective.

    A sample depends on the weights, its prompt, its place in the group and `seed`. Raises RolloutError on
    every process if the engine of one does.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = prompts[rank::world]
    requests = [
        Request(prompt.token_ids, sample_seed(*seed, prompt.index, i))
        for prompt in mine
        for i in range(group_size)
    ]
    outcome: list[Group] | RolloutError
    try:
        samples = engine.generate(requests, sampling) if requests else []
        outcome = _score(mine, samples, verifier, tokenizer, group_size)
    except RolloutError as error:
        outcome = error
    shares = gathered(outcome)
    for share in shares:
        if isinstance(share, RolloutError):
            raise share
    return [shares[i % world][i // world] for i in range(len(prompts))]


def _score(
    prompts: list[Prompt],
    samples: list[Sample],
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    group_size: int,
) -> list[Group]:
    texts = tokenizer.batch_decode([s.token_ids for s in samples], skip_special_tokens=True)
    truths = [prompt.ground_truth for prompt in prompts for _ in range(group_size)]
    rewards = verifier(texts, truths)
    groups = []
    for i, prompt in enumerate(prompts):
        own = slice(i * group_size, (i + 1) * group_size)
        groups.append(Group(prompt, samples[own], texts[own], rewards[own]))
    return groups
