"""What SGLang's /weights_checker says of weights, computed from the policy's own tensors.

The server hashes each parameter of its own model, on each of its tensor-parallel ranks: the first 8 bytes of
the SHA-256 of the parameter's bytes, in hexadecimal. Its parameters differ from Hugging Face's in three ways:

    fused       q, k, v into qkv_proj; gate, up into gate_up_proj; all experts' into w13_weight and w2_weight
    cut         by rows (vocabulary, heads, gate and up) or by columns (o_proj, down_proj) over the ranks
    padded      with zeros: the vocabulary to a multiple of 64; heads, so that all ranks get as many;
                the inner dimension of an MLP or an expert, to a multiple of 32 on each rank
"""

import hashlib
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

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
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        group = heads // kv_heads * head_dim
        inner = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), INNER_MULTIPLE)
        self._unit = inner | {"q_proj": group, "o_proj": group, "k_proj": head_dim, "v_proj": head_dim}
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
