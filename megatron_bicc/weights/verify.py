"""Checks that an SGLang server has the policy's weights: by log-probs always, by checksums where comparable.

**Log-probs.** After every sync the server samples a few tokens, and the policy computes their log-probs.

**Checksums.** SGLang's /weights_checker hashes each parameter of the server's model on each of its
tensor-parallel ranks: the first 8 bytes of the SHA-256 of the parameter's bytes, in hexadecimal. `Checksums`
computes the same from the policy's tensors. The server's parameters differ from Hugging Face's in three ways:

    fused       q, k, v into qkv_proj; gate, up into gate_up_proj; all experts' into w13_weight and w2_weight
    cut         by rows (vocabulary, heads, gate and up) or by columns (o_proj, down_proj) over the ranks
    padded      with zeros: the vocabulary to a multiple of 64; heads, so that all ranks get as many;
                the inner dimension of an MLP or an expert, to a multiple of 32 on each rank

That holds on CPUs without quantization and with tensor parallelism only (`comparable`). Hashing takes longer
than copying, so a sync may hash a share of the parameters (`share_of`), on both sides.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc.weights.transport import Receiver, WeightSyncError

# ---- Log-probs


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and responses to it, as tokens."""

    prompt: np.ndarray
    """int32 [P]"""
    responses: list[np.ndarray]
    """int32 [T] each; at least two"""


LogProbs = Callable[[list[TokenGroup]], np.ndarray]
"""Returns the policy's log-probs of all response tokens at rollout.temperature, float32, one response after
the other. Collective."""

PROMPT_TOKENS, SAMPLES, SAMPLED_TOKENS = 8, 2, 16
LARGEST_FP32 = 1e-4
"""Tolerance of every log-prob if the policy and the server are both in fp32"""
MEDIAN_16_BITS = 0.08
"""Tolerance of the median otherwise: rounding may make a router choose another expert for single tokens"""


@dataclass(frozen=True)
class Probe:
    """A few tokens that a server sampled after a sync, with its log-probs."""

    url: str
    dtype: torch.dtype
    """Type of the server's weights"""
    group: TokenGroup
    log_probs: np.ndarray
    """float32 [T]: the server's, of all response tokens, one response after the other"""
    unequal: list[str]
    """Parameters whose checksums differ, though the log-probs may agree"""


async def probe(receiver: Receiver, temperature: float, vocabulary: int, unequal: Iterable[str]) -> Probe:
    """Samples a few tokens from a server. Raises ServerError."""
    prompt = np.arange(1, 1 + PROMPT_TOKENS, dtype=np.int32) % vocabulary
    sampling = {"max_new_tokens": SAMPLED_TOKENS, "temperature": temperature, "ignore_eos": True}
    body = {"input_ids": [prompt.tolist()] * SAMPLES, "sampling_params": sampling, "return_logprob": True}
    if receiver.pause_mode == "in_place":  # its cache still has prefixes of the old weights
        body["extra_key"] = uuid4().hex
    responses, log_probs = [], []
    for answer in await receiver.post("/generate", body):
        rows = answer["meta_info"]["output_token_logprobs"]
        responses.append(np.array([token for _, token, *_ in rows], np.int32))
        log_probs += [log_prob for log_prob, *_ in rows]
    group = TokenGroup(prompt, responses)
    return Probe(receiver.client.url, receiver.dtype, group, np.array(log_probs, np.float32), sorted(unequal))


def disagreeing(probes: list[Probe], log_probs: LogProbs, dtype: torch.dtype) -> list[Probe]:
    """Returns the probes whose log-probs are not those of the policy, whose type is `dtype`. Collective.

    probes: those of all processes. Every process must pass the same ones; the result is the same on all.
    """
    ours = log_probs([one.group for one in probes])
    found, end = [], 0
    for one in probes:
        start, end = end, end + len(one.log_probs)
        both_fp32 = {dtype, one.dtype} == {torch.float32}
        if not _agree(np.abs(ours[start:end] - one.log_probs), both_fp32):
            found.append(one)
    return found


def _agree(differences: np.ndarray, both_fp32: bool) -> bool:
    """Returns whether the differences are within the tolerance; NaN is not."""
    if both_fp32:
        return bool(differences.max() <= LARGEST_FP32)
    return bool(np.median(differences) <= MEDIAN_16_BITS)


# ---- Checksums


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
COMPARABLE = {"device": "cpu", "quantization": None, "pp_size": 1, "dp_size": 1, "ep_size": 1}
"""Arguments of servers whose checksums `Checksums` computes"""
CHECKER = "/weights_checker"
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)\.weight")


SHARES = 8
"""Syncs after which every parameter has been compared"""


@dataclass(frozen=True)
class Share:
    """The server's parameters that a sync compares."""

    names: frozenset[str]
    others: frozenset[str]


def share_of(shapes: Mapping[str, tuple[int, ...]], turn: int) -> Share:
    """Returns about 1/SHARES of the server's elements; SHARES turns in a row have all of them.

    shapes: of the Hugging Face tensors, by name.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        sizes[server_name(name)] = sizes.get(server_name(name), 0) + math.prod(shape)
    shares: list[list[str]] = [[] for _ in range(SHARES)]
    totals = [0] * SHARES
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        shares[smallest].append(name)
        totals[smallest] += sizes[name]
    names = frozenset(shares[turn % SHARES])
    return Share(names, frozenset(sizes) - names)


class Checksums:
    """Checksums of every parameter on each tensor-parallel rank of a server; computed tensor by tensor.

    The parts of a fused parameter must be added in the order listed above, experts by number.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        tensor_parallel: int,
        dtype: torch.dtype,
        share: Share | None = None,
    ) -> None:
        """tensor_parallel, dtype: the server's. share: parameters to hash; None: all."""
        heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
        channels = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        group = heads // kv_heads * channels
        inner = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), INNER_MULTIPLE)
        # rows (or columns) that each rank gets a multiple of; query heads stay with their key-value head
        self._unit = inner | {"q_proj": group, "o_proj": group, "k_proj": channels, "v_proj": channels}
        self._size = tensor_parallel
        self._dtype = dtype
        self.share = share
        self._hashes: list[dict[str, hashlib._Hash]] = [{} for _ in range(tensor_parallel)]

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a whole Hugging Face tensor in host memory."""
        key = server_name(name)
        if self.share and key not in self.share.names:
            return
        tensor = tensor.to(self._dtype)
        for rank, hashes in enumerate(self._hashes):
            part = self._part(name, tensor, rank).contiguous()
            hashes.setdefault(key, hashlib.sha256()).update(part.view(torch.uint8).numpy().data)

    def of_rank(self, rank: int) -> dict[str, str]:
        """Returns the checksums by the parameters' names on the server."""
        return {name: value.hexdigest()[:16] for name, value in self._hashes[rank].items()}

    def _part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        kind = name.split(".")[-2]
        if kind in ("embed_tokens", "lm_head"):
            multiple = self._vocabulary_multiple(len(tensor))
        elif kind in self._unit:
            multiple = self._unit[kind] * self._size
        else:
            return tensor
        along = int(kind in BY_COLUMNS)
        missing = -tensor.shape[along] % multiple
        if missing:  # pad copies even if nothing is missing
            tensor = torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 1 - along), 0, missing))
        return tensor.chunk(self._size, along)[rank]

    def _vocabulary_multiple(self, vocabulary: int) -> int:
        padded = vocabulary + -vocabulary % VOCABULARY_MULTIPLE
        return VOCABULARY_MULTIPLE if padded % self._size == 0 else VOCABULARY_MULTIPLE * self._size


def server_name(name: str) -> str:
    """Returns the server's parameter that a Hugging Face tensor is a part of."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        return f"{expert[1]}.{FUSED_EXPERTS[expert[2]]}"
    *path, kind, suffix = name.split(".")
    return ".".join([*path, FUSED.get(kind, kind), suffix])


def comparable(receiver: Receiver) -> bool:
    """Returns whether the server's checksums are those that `Checksums` computes."""
    info = receiver.info
    plain = all(info.get(name) == value for name, value in COMPARABLE.items())
    known = plain and info["dtype"] != "auto" and not info.get("enable_dp_attention")
    return known and CHECKER in receiver.paths


async def unequal_parameters(receiver: Receiver, checksums: Checksums) -> set[str]:
    """Returns the server's parameters whose checksums differ from these. Raises ServerError."""
    share = checksums.share
    served = await served_checksums(receiver, sorted(share.others) if share else [])
    if share:  # also of a server that does not know how to leave some out
        served = [{name: theirs[name] for name in theirs.keys() & share.names} for theirs in served]
    return {name for rank, theirs in enumerate(served) for name in unequal(checksums.of_rank(rank), theirs)}


async def changed_by_files(receiver: Receiver, directory: Path) -> set[str]:
    """Returns the parameters of a server that change when it loads the right weights from files.

    Works for any kind of checksum, since it compares the server's own before and after. Raises ServerError.
    """
    before = await served_checksums(receiver)
    await receiver.load_files(directory)
    after = await served_checksums(receiver)
    return {name for rank in range(len(after)) for name in unequal(before[rank], after[rank])}


async def served_checksums(receiver: Receiver, without: Sequence[str] = ()) -> list[dict[str, str]]:
    """Returns the checksums by parameter on each of the server's ranks. Raises ServerError.

    without: parameters that need none.
    """
    body = {"action": "checksum", "skip_tensor_list": list(without)}
    return [rank["checksums"] for rank in (await receiver.post(CHECKER, body))["ranks"]]


def unequal(ours: dict[str, str], theirs: dict[str, str]) -> set[str]:
    """Returns the names whose checksums differ or that only one side has."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def mismatch(url: str, names: Iterable[str]) -> WeightSyncError:
    """Returns the error for a server with these parameters wrong; no names: it is unknown which."""
    return WeightSyncError(
        f"after weight sync SGLang server {url} has other weights than the policy: "
        f"{listed(names) or 'parameters could not be identified'}"
    )


def listed(names: Iterable[str]) -> str:
    """Returns the first three names and the number of the others."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
