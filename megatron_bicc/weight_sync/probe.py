"""The proof where checksums do not serve: log-probs of what a server samples, against the policy's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bicc.data import Prompt
from megatron_bicc.rollout.types import Group, Sample
from megatron_bicc.weight_sync.methods import load_files
from megatron_bicc.weight_sync.proof import served_checksums, unequal
from megatron_bicc.weight_sync.session import Session

PROMPT_TOKENS, SAMPLES, SAMPLED_TOKENS = 8, 2, 16
LARGEST_FP32 = 1e-4
"""Difference of any log-prob, if the policy and the server are both in fp32"""
MEDIAN_16_BITS = 0.08
"""Otherwise, of half of the log-probs. Single ones may jump: rounding makes a router choose another expert"""


@dataclass(frozen=True)
class Probe:
    """What a server sampled after a sync."""

    url: str
    group: Group
    dtype: torch.dtype
    """Of the server's weights"""
    differ: list[str]
    """Parameters whose checksums differ; empty if the server's checksums cannot be compared"""


async def take(session: Session, temperature: float, vocabulary: int, differ: list[str]) -> Probe:
    """Samples from a server. Raises ServerError."""
    prompt = np.arange(1, 1 + PROMPT_TOKENS, dtype=np.int32) % vocabulary
    sampling = {"max_new_tokens": SAMPLED_TOKENS, "temperature": temperature, "ignore_eos": True}
    body = {"input_ids": [prompt.tolist()] * SAMPLES, "sampling_params": sampling, "return_logprob": True}
    samples = [_sample(answer) for answer in await session.post("/generate", body)]
    group = Group(Prompt(0, [], prompt, "", "", {}), samples, [""] * SAMPLES, np.zeros(SAMPLES, np.float32))
    return Probe(session.client.url, group, session.dtype, differ)


def _sample(answer: dict[str, Any]) -> Sample:
    rows = answer["meta_info"]["output_token_logprobs"]
    log_probs = np.array([log_prob for log_prob, *_ in rows], np.float32)
    return Sample(np.array([token for _, token, *_ in rows], np.int32), log_probs, "length", 0)


def wrong(
    probes: list[Probe], log_probs: Callable[[list[Group]], np.ndarray], dtype: torch.dtype
) -> list[Probe]:
    """Those that the policy, of type `dtype`, does not agree with; the same on every process. Collective.

    log_probs: float32 [T], the policy's, of every sampled token of the groups.
    """
    ours_T = log_probs([probe.group for probe in probes])
    found, end = [], 0
    for probe in probes:
        theirs = np.concatenate([sample.log_probs for sample in probe.group.samples])
        start, end = end, end + len(theirs)
        if not _agree(np.abs(ours_T[start:end] - theirs), {dtype, probe.dtype} == {torch.float32}):
            found.append(probe)
    return found


def _agree(difference_T: np.ndarray, fp32: bool) -> bool:
    """Not if one is NaN."""
    if fp32:
        return bool(difference_T.max() <= LARGEST_FP32)
    return bool(np.median(difference_T) <= MEDIAN_16_BITS)


async def differing(session: Session, directory: Path) -> list[str]:
    """The server's parameters that change when it loads the right weights from files. Raises ServerError.

    Whatever kind its checksums are of, equal ones are of equal weights.
    """
    before = await served_checksums(session)
    await load_files(session, directory)
    after = await served_checksums(session)
    return [name for rank in range(len(after)) for name in unequal(before[rank], after[rank])]
