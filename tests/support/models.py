"""Small random policies in Hugging Face format."""

from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MODELS = (
    "qwen3_tied",
    "qwen3_untied",
    "qwen2",
    "llama3",
    "qwen3_yarn",
    "gemma3",
    "qwen3_moe",
    "qwen3_moe_raw_gates",
    "qwen3_moe_top1",
    "qwen3_moe_top1_raw_gates",
    "qwen2_moe",
)
VOCAB = 101
SHAPE = {
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
WINDOW = 6
"""Tokens that a sliding layer of gemma3 sees: fewer than a prefix has, or a response"""


def make_model(name: str, layers: int = 2) -> PreTrainedModel:
    """Returns a random Hugging Face model; there is one for each family and for each optional feature."""
    shape = SHAPE | {"num_hidden_layers": layers}
    sizes = {"hidden_size": 48, "intermediate_size": 80}
    experts = {"moe_intermediate_size": 40, "num_experts": 4, "head_dim": 16}
    moe = lambda normalised, chosen: Qwen3MoeForCausalLM(  # noqa: E731
        Qwen3MoeConfig(
            **shape,
            **sizes,
            **experts,
            num_experts_per_tok=chosen,
            norm_topk_prob=normalised,
            tie_word_embeddings=not normalised,
        )
    )
    make = {
        "qwen3_tied": lambda: Qwen3ForCausalLM(
            Qwen3Config(**shape, hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=True)
        ),
        # head_dim != hidden / heads
        "qwen3_untied": lambda: Qwen3ForCausalLM(
            Qwen3Config(**shape, **sizes, head_dim=32, tie_word_embeddings=False)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, **sizes, tie_word_embeddings=True)),
        "llama3": lambda: LlamaForCausalLM(
            LlamaConfig(**shape, **sizes, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)
        ),
        "qwen3_yarn": lambda: Qwen3ForCausalLM(
            Qwen3Config(**shape, **sizes, head_dim=32, tie_word_embeddings=False, rope_parameters=YARN_ROPE)
        ),
        # every other layer sees the last WINDOW tokens; the rotary embedding of the others is scaled
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **shape | {"pad_token_id": None},
                **sizes,
                head_dim=16,
                query_pre_attn_scalar=24,
                sliding_window=WINDOW,
                layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
                rope_parameters=GEMMA3_ROPE,
            )
        ),
        "qwen3_moe": lambda: moe(True, 2),
        "qwen3_moe_raw_gates": lambda: moe(False, 2),
        "qwen3_moe_top1": lambda: moe(True, 1),
        "qwen3_moe_top1_raw_gates": lambda: moe(False, 1),
        "qwen2_moe": lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **shape,
                **sizes,
                **{name: size for name, size in experts.items() if name != "head_dim"},
                num_experts_per_tok=2,
                shared_expert_intermediate_size=56,
                tie_word_embeddings=False,
            )
        ),
    }
    torch.manual_seed(7)
    model = make[name]()
    for parameter_name, parameter in model.named_parameters():
        # norms of one and biases of zero would hide bugs
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            mean = float("norm" in parameter_name and name != "gemma3")  # gemma3 adds 1 to the weight
            torch.nn.init.normal_(parameter, mean, std=0.2)
    return model.float().eval()


def save_models(root: Path) -> dict[str, Path]:
    """Saves all models; returns their directories by name."""
    for name in MODELS:
        make_model(name).save_pretrained(root / name)
    return {name: root / name for name in MODELS}
