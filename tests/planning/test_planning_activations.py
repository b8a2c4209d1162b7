"""Tests the plan's saved bytes against the storages that a real forward pass keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.layout import row_batch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.build import PolicyModel, build_modules, transformer_config
from megatron_bicc.planning.cost import Sizes, saved_bytes

ROWS = 384
SHAPE = {"vocab_size": 500, "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 8}
MODELS = {
    "llama": LlamaConfig(
        **SHAPE, intermediate_size=448, num_key_value_heads=2, architectures=["LlamaForCausalLM"]
    ),
    "qwen2": Qwen2Config(
        **SHAPE, intermediate_size=320, num_key_value_heads=8, architectures=["Qwen2ForCausalLM"]
    ),
    "qwen3": Qwen3Config(
        **SHAPE,
        intermediate_size=256,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    ),
    "experts": Qwen3MoeConfig(
        **SHAPE,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
    ),
    "tiny": AutoConfig.from_pretrained(Path(__file__).parents[2] / "examples/tiny_policy"),
}


def build(hf_config: PretrainedConfig, config: Config) -> PolicyModel:
    """The policy with random weights."""
    with device.megatron():
        (module,) = build_modules(transformer_config(hf_config, config), hf_config, 1.0, torch.device("cpu"))
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)
    return module.train()


def measure(module: PolicyModel) -> int:
    """Bytes of all storages that autograd keeps for one forward pass, each once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = np.random.default_rng(0).integers(2, 200, ROWS + 1).astype(np.int32)
    with device.megatron(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.run(row_batch(tokens))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("model", "dtype", "recompute"),
    [
        ("llama", "float32", "none"),
        ("qwen2", "bfloat16", "none"),
        ("qwen3", "bfloat16", "none"),
        ("qwen3", "float32", "selective"),
        ("llama", "bfloat16", "full"),
        ("tiny", "float32", "none"),
        ("experts", "bfloat16", "none"),
        ("experts", "float32", "selective"),
    ],
)
def test_saved_bytes_equal_a_forward_pass(
    single_process: None, model: str, dtype: str, recompute: str
) -> None:
    config, hf_config = Config(), MODELS[model]
    config.model.dtype, config.model.recompute = dtype, recompute
    planned = saved_bytes(Sizes.of(hf_config), config, ROWS, ROWS, norms="composite")
    total = hf_config.num_hidden_layers * planned.layer + planned.first_stage + planned.last_stage
    assert total == pytest.approx(measure(build(hf_config, config)), rel=0.05)


def test_sequence_and_tensor_parallel_cut_what_they_hold() -> None:
    """Llama-3-70B, 16,384 rows, bf16, by hand: two norms and the inputs of two products are each 8192 wide
    and cut by sequence parallel; queries, keys and values, MLP and attention's output by tensor parallel."""
    config = Config()
    config.parallel.tensor, config.parallel.sequence = 8, True
    sizes = Sizes(80, 8192, 64, 8, 128, 28672, 0, 0, 0, 128256, False, False)
    rows, narrow = 16384, 2 * 8192 * 4 + 2 * 4
    attention = 2 * 128 * ((8 + 2) + (8 + 1) + 8 + 4) + 4 * 8
    by_hand = rows // 8 * narrow + rows * (attention + 2 * 5 * 3584)
    assert saved_bytes(sizes, config, rows, rows).layer == by_hand
