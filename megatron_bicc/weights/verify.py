"""What SGLang's /weights_checker says of weights, computed from the policy's own tensors.

The server hashes each parameter of its own model, on each of its tensor-parallel ranks: the first 8 bytes of
the SHA-256 of the parameter's bytes, in hexadecimal. Its parameters differ from Hugging Face's in three ways:

    fused       q, k, v into qkv_proj; gate, up into gate_up_proj; all experts' into w13_weight and w2_weight
    cut         by rows (vocabulary, heads, gate and up) or by columns (o_proj, down_proj) over the ranks
    padded      with zeros: the vocabulary to a multiple of 64; heads, so that all ranks get as many;
                the inner dimension of an MLP or an expert, to a multiple of 32 on each rank

The proof where checksums do not serve: log-probs of what a server samples, against the policy's.

The proof that servers hold the policy's weights: their checksums against ours.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc.data.prompts import Prompt
from megatron_bicc.model.families import head_dim
from megatron_bicc.rollout.types import Group, Sample
from megatron_bicc.weights.transport import Bucket, Session, WeightSyncError, load_files

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 64
INNER_MULTIPLE = 32
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
FUSED_EXPERTS = {"gate_proj": "w13_weight", "up_proj": "w13_weight", "down_proj": "w2_weight"}
BY_COLUMNS = ("o_proj", "down_proj")
_PLAIN = {"device": "cpu", "quantization": None, "pp_size": 1, "dp_size": 1, "ep_size": 1}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)\.weight")


class Checksums:
    """Of every parameter of a server, on every one of its tensor-parallel ranks; fed a tensor at a time.

    The parts of a fused parameter must come in the order that stands above, experts by number.
    """

    def __init__(self, hf_config: PretrainedConfig, tensor_parallel: int, dtype: torch.dtype) -> None:
        """tensor_parallel, dtype: the server's."""
        heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
        channels = head_dim(hf_config)
        group = heads // kv_heads * channels
        inner = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), INNER_MULTIPLE)
        self._unit = inner | {"q_proj": group, "o_proj": group, "k_proj": channels, "v_proj": channels}
        self.size = tensor_parallel
        self.dtype = dtype
        self._hashes: list[dict[str, hashlib._Hash]] = [{} for _ in range(tensor_parallel)]

    def add(self, name: str, tensor: Tensor) -> None:
        """One Hugging Face tensor, whole."""
        tensor = tensor.to("cpu", self.dtype)
        for rank, hashes in enumerate(self._hashes):
            part = self._part(name, tensor, rank).contiguous()
            key = server_name(name)
            hashes.setdefault(key, hashlib.sha256()).update(part.view(torch.uint8).numpy().data)

    def of_rank(self, rank: int) -> dict[str, str]:
        """Name on the server: checksum."""
        return {name: value.hexdigest()[:16] for name, value in self._hashes[rank].items()}

    def _part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        kind = name.split(".")[-2]
        if kind in ("embed_tokens", "lm_head"):
            multiple = self._vocabulary_multiple(len(tensor))
        elif kind in self._unit:
            multiple = self._unit[kind] * self.size
        else:
            return tensor
        along = int(kind in BY_COLUMNS)
        missing = -tensor.shape[along] % multiple
        if missing:  # pad would copy, too, where there is none
            tensor = torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 1 - along), 0, missing))
        return tensor.chunk(self.size, along)[rank]

    def _vocabulary_multiple(self, vocabulary: int) -> int:
        padded = vocabulary + -vocabulary % VOCABULARY_MULTIPLE
        return VOCABULARY_MULTIPLE if padded % self.size == 0 else VOCABULARY_MULTIPLE * self.size


def are_known(server_info: dict[str, Any]) -> bool:
    """Whether the checksums of a server with these arguments are those that `Checksums` computes."""
    plain = all(server_info.get(name) == value for name, value in _PLAIN.items())
    return plain and server_info["dtype"] != "auto" and not server_info.get("enable_dp_attention")


def server_name(name: str) -> str:
    """The server's parameter that a Hugging Face tensor is a part of."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        return f"{expert[1]}.{FUSED_EXPERTS[expert[2]]}"
    *path, kind, suffix = name.split(".")
    return ".".join([*path, FUSED.get(kind, kind), suffix])


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


PATH = "/weights_checker"
Layout = tuple[int, torch.dtype]
"""Tensor-parallel size and type of a server's weights"""


class Proof:
    """Checksums of the newest sync's weights, for each way in which the servers hold them."""

    def __init__(self, hf_config: PretrainedConfig) -> None:
        self.hf_config = hf_config
        self.doubts: dict[str, list[str]] = {}
        """By URL, what differs in servers that checksums do not prove; nothing if they cannot be compared"""
        self._checksums: dict[Layout, Checksums] = {}
        self._agreed: set[Layout] = set()
        """Layouts whose checksums have agreed once: it is known how they are made"""

    def start(self, sessions: list[Session]) -> None:
        """Of the weights that come now, in the layouts of these servers and of those before."""
        layouts = {_layout(session) for session in sessions if _can_check(session)} | set(self._checksums)
        self._checksums = {layout: Checksums(self.hf_config, *layout) for layout in layouts}
        self.doubts = {}

    def add(self, bucket: Bucket) -> None:
        """Some more of the weights."""
        for checksums in self._checksums.values():
            for name, tensor in bucket.tensors:
                checksums.add(name, tensor)

    async def check(self, session: Session) -> None:
        """Compares all parameters of a server; where that does not tell, the doubt is kept.

        Checksums that differ at the first comparison may be of weights in a form that is not known here.
        Raises WeightSyncError naming the parameters that differ, ServerError if the server fails.
        """
        layout = _layout(session)
        if layout not in self._checksums or not _can_check(session):
            self.doubts[session.client.url] = []
            return
        differ: set[str] = set()
        for rank, theirs in enumerate(await served_checksums(session)):
            differ |= unequal(self._checksums[layout].of_rank(rank), theirs)
        if not differ:
            self._agreed.add(layout)
        elif layout in self._agreed:
            raise mismatch(session.client.url, differ)
        else:
            logger.warning(
                "SGLang server %s: checksums differ at the first sync, log-probs are to decide: %s",
                session.client.url,
                _listed(differ),
            )
            self.doubts[session.client.url] = sorted(differ)


async def served_checksums(session: Session) -> list[dict[str, str]]:
    """The server's parameters and their checksums, on each of its ranks. Raises ServerError."""
    return [rank["checksums"] for rank in (await session.post(PATH, {"action": "checksum"}))["ranks"]]


def unequal(ours: dict[str, str], theirs: dict[str, str]) -> set[str]:
    """Names that stand for different checksums, or in one of them only."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def mismatch(url: str, names: Iterable[str]) -> WeightSyncError:
    """The error for a server with these parameters wrong; no names: it is not known which."""
    return WeightSyncError(
        f"after weight sync SGLang server {url} has other weights than the policy: "
        f"{_listed(names) or 'it cannot tell which'}"
    )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _layout(session: Session) -> Layout:
    return session.tensor_parallel, session.dtype


def _can_check(session: Session) -> bool:
    return PATH in session.paths and are_known(session.info)
