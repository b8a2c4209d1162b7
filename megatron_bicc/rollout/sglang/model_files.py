"""Whether SGLang reads a Hugging Face directory as the policy does: its rules are not transformers'."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megatron_bicc.config import RolloutConfig
from megatron_bicc.policy.hf_files import INDEX, SINGLE, weight_map
from megatron_bicc.rollout.sglang.arguments import context_length

ACCEPTED: dict[str, Any] = {
    "rope_is_neox_style": True,
    "dual_chunk_attention_config": None,
    "scale_emb": None,
    "original_num_attention_heads": None,
}
"""Entries of config.json that SGLang reads and transformers does not, and the value that changes nothing"""
LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Where SGLang looks for the longest context, the first that is there"""


def check_model_files(path: Path, hf_config: PretrainedConfig, files: set[str]) -> None:
    """Raises ValueError, one line, where a server would load other files than `files`, or compute otherwise.

    SGLang loads what the index names if there is one, else every safetensors file of the directory.
    """
    index = path / INDEX
    if index.is_file():
        theirs = set(weight_map(index).values())
    else:
        theirs = {file.name for file in path.glob("*.safetensors")}
        if theirs == {"consolidated.safetensors", SINGLE}:
            theirs = {SINGLE}
    for name in sorted(theirs ^ files):
        named = f"{SINGLE} and {INDEX} lie side by side: " if index.is_file() else ""
        reader, other = ("SGLang", "transformers") if name in theirs else ("transformers", "SGLang")
        raise ValueError(
            f"{path}: {named}{reader} reads {name} and {other} does not; remove what is left over"
        )
    for key, value in ACCEPTED.items():
        found = vars(hf_config).get(key, value)
        if found != value:
            raise ValueError(
                f"{path}/config.json: {key} is {found!r}, which SGLang computes and the policy does not; "
                "remove it or use rollout.engine=local"
            )


def server_positions(hf_config: PretrainedConfig, rollout: RolloutConfig) -> int:
    """Tokens of the longest sequence that a server takes; one that is attached is taken to have no less."""
    scaling = hf_config.rope_parameters
    factor = 1.0 if "original_max_position_embeddings" in scaling else scaling.get("factor", 1.0)
    most = int(factor * next(vars(hf_config)[key] for key in LENGTHS if vars(hf_config).get(key)))
    given = context_length(rollout.sglang.server_args) if rollout.launch == "spawn" else None
    return min(most, given or most)
