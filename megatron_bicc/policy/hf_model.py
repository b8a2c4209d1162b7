"""A Hugging Face directory as a policy: what every command checks before it uses one, and reads it by.

Training, evaluation, dry run, plan and conversion all come by here, so they give one verdict; and the rollout
engine's model is filled with the same tensors as the policy.
"""

import copy
import logging
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megatron_bicc import platform
from megatron_bicc.errors import first_line
from megatron_bicc.policy.architecture import family_of
from megatron_bicc.policy.hf_files import (
    INDEX,
    SINGLE,
    HfTensors,
    SafetensorsDirectory,
    open_tensors,
    read_config,
)
from megatron_bicc.policy.rotary import head_dim

logger = logging.getLogger(__name__)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def supported_config(path: str | Path) -> PretrainedConfig:
    """The directory's configuration. Raises ValueError if the policy does not compute what it says."""
    hf_config = read_config(path)
    try:
        family_of(hf_config)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from None
    return hf_config


def checked_tensors(
    path: str | Path, hf_config: PretrainedConfig, allow_pickle: bool = False
) -> tuple[HfTensors, dict[str, Tensor]]:
    """The directory's tensors, and their shapes and dtypes as meta tensors.

    Reads headers only, and the output layer where config.json ties it and the files hold it, too. Raises
    ValueError, one line, for a damaged file, and for the first tensor that is missing, unexpected, misshapen
    or of a type that is no float.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}/adapter_config.json: an adapter is not applied; merge it into the model, or remove it"
        )
    tensors = open_tensors(path, allow_pickle)
    found = tensors.describe()
    _check_names(path, hf_config, found)
    _check_tied_output(tensors, hf_config, found)
    return tensors, found


def warn_of_index(path: str | Path) -> None:
    """One line, on the first process, where an index of other files is left beside model.safetensors."""
    if platform.is_first() and all((Path(path) / name).is_file() for name in (SINGLE, INDEX)):
        logger.warning("%s: %s lies beside %s and is not read, as transformers has it", path, INDEX, SINGLE)


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a supported model; no output layer where it is tied."""
    family, c = family_of(hf_config), hf_config
    hidden, size = c.hidden_size, head_dim(c)
    queries, keys = c.num_attention_heads * size, c.num_key_value_heads * size
    attention = {"q": queries, "k": keys, "v": keys}
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {f"self_attn.{x}_proj.weight": (rows, hidden) for x, rows in attention.items()}
    layer["self_attn.o_proj.weight"] = (hidden, queries)
    if family.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (rows,) for x, rows in attention.items()}
    if family.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (size,) for x in "qk"}
    inner = c.moe_intermediate_size if family.experts else c.intermediate_size
    for mlp in [f"mlp.experts.{e}." for e in range(c.num_experts)] if family.experts else ["mlp."]:
        layer |= {f"{mlp}{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        layer[f"{mlp}down_proj.weight"] = (hidden, inner)
    if family.experts:
        layer["mlp.gate.weight"] = (c.num_experts, hidden)
    shapes = {EMBEDDING: (c.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not c.tie_word_embeddings:
        shapes[OUTPUT] = (c.vocab_size, hidden)
    return shapes | {
        f"model.layers.{i}.{name}": shape for i in range(c.num_hidden_layers) for name, shape in layer.items()
    }


def load_transformers(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own model on the CPU, in evaluation mode, with the tensors that the policy reads.

    Raises ValueError, one line, for a directory that is not supported or damaged.
    """
    hf_config = copy.deepcopy(supported_config(path))
    checked_tensors(path, hf_config)
    # only an embedding's gradient knows it, and one outside of the vocabulary ends transformers
    hf_config.pad_token_id = None
    slices = SafetensorsDirectory(path).slices()
    if hf_config.tie_word_embeddings:
        slices.pop(OUTPUT, None)
    try:
        # config.json has no say in the kernels: naming one could fetch it, and run it
        return getattr(transformers, hf_config.architectures[0]).from_pretrained(
            None, config=hf_config, state_dict=slices, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: its weights cannot be read: {first_line(error)}") from error


def _check_names(path: Path, hf_config: PretrainedConfig, found: dict[str, Tensor]) -> None:
    expected = expected_shapes(hf_config)
    if hf_config.tie_word_embeddings and OUTPUT in found:
        expected[OUTPUT] = expected[EMBEDDING]
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {tuple(found[name].shape)}; config.json asks for {shape}"
            )
        if not found[name].is_floating_point():
            raise ValueError(f"{path}: tensor {name} is not of float32, float16 or bfloat16")
    for name in sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path}: tensor {name} is not part of a {hf_config.architectures[0]}; remove it")


def _check_tied_output(tensors: HfTensors, hf_config: PretrainedConfig, found: dict[str, Tensor]) -> None:
    if not hf_config.tie_word_embeddings or OUTPUT not in found:
        return
    if not torch.equal(tensors.read(OUTPUT), tensors.read(EMBEDDING)):
        raise ValueError(
            f"{tensors.path}: tensor {OUTPUT} differs from {EMBEDDING}, "
            "but config.json has tie_word_embeddings=true"
        )
