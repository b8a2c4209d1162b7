"""Tests config.json: refuses what the policy does not compute, accepts what transformers ignores."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bicc.checkpoint.compare_logits import cached_logits
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import ACCEPTED, positions, supported_config
from megatron_bicc.rollout.local import LocalEngine
from megatron_bicc.rollout.types import Request, Sampling
from megatron_bicc.weights.hf_files import load_transformers

FAMILIES = ("llama3", "qwen2", "qwen3_untied", "qwen3_moe", "qwen2_moe", "gemma3")
ACTIVATION = {"gemma3": "hidden_activation"}
"""Its entry of config.json where it is not hidden_act"""
COMPUTED = {"gemma3": {"sliding_window", "layer_types"}}
"""Entries of ACCEPTED of which the family computes other values too"""
TOKENIZER = type("Tokenizer", (), {"eos_token_id": 1, "pad_token_id": 0, "get_added_vocab": dict})
"""Test double: the engine asks a tokenizer for these two ids only."""
PROMPT = np.random.default_rng(0).integers(2, 100, size=24).astype(np.int32)

OTHER: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu", "swish"],
    "attention_bias": [True],
    "mlp_bias": [True],
    "attention_dropout": [0.5],
    "sliding_window": [4, 0],
    "use_sliding_window": [True],
    "max_window_layers": [0],
    "attention_chunk_size": [4],
    "layer_types": [["sliding_attention"] * 2, ["full_attention"] * 2, ["linear_attention"] * 2, "full"],
    "per_layer_config": [{"0": {"sliding_window": 4}}],
    "kv_sharing_modes": [[None, "shared"], ["none", "none"]],
    "is_causal": [False],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]],
    "qkv_bias": [False],
    "transformers_weights": ["other.safetensors"],
    "quantization_config": [{"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, {}, "int8"],
    "compression_config": [{"quant_method": "compressed-tensors"}],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_scaling": [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
        {"type": "mrope", "mrope_section": [2, 2, 2]},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "yarn"},
        {"rope_type": "linear", "factor": 0.0},
        {"rope_type": "linear", "factor": "two"},
        {"rope_type": 7},
    ],
    "rope_theta": ["many", None, 0],
    "num_key_value_heads": [3, None],
    "head_dim": [None, 0, 7, 12.5],
    "pad_token_id": [5, 100_000, -1],
    "bos_token_id": [7],
    "is_encoder_decoder": [True],
    "is_decoder": [True],
    "return_dict": [False],
    "use_cache": [False],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "output_router_logits": [True],
    "router_aux_loss_coef": [1.0],
    "text_config": [{"hidden_size": 3}],
    "decoder": [{"hidden_size": 3}],
    "generator": [{"hidden_size": 3}],
    "attn_implementation": ["eager", "flash_attention_2", "nobody/kernels"],
    "initializer_range": [1.0],
    "gradient_checkpointing": [True],
    "base_model_tp_plan": [{}],
    "base_model_pp_plan": [{}],
    "base_model_ep_plan": [{}],
    "base_model_fsdp_plan": [{}],
    "dtype": ["bfloat16"],
    # of other families, or of nobody
    "attn_logit_softcapping": [1.0],
    "final_logit_softcapping": [1.0],
    "hidden_activation": ["silu", "gelu"],
    "use_bidirectional_attention": [True],
    "tie_word_embeddings": [False],
    "cache_implementation": ["hybrid"],
    "attention_multiplier": [3.0],
    "logits_scaling": [3.0],
    "logit_scale": [3.0],
    "clip_qkv": [0.1],
    "pretraining_tp": [2],
    "qk_norm": [True],
    "use_qk_norm": [True],
    "anything": ["at all"],
    # of generation, which old files keep here
    "temperature": [0.1],
    "top_k": [1],
    "top_p": [0.1],
    "typical_p": [0.1],
    "repetition_penalty": [9.0],
    "no_repeat_ngram_size": [1],
    "num_beams": [2],
    "do_sample": [True],
    "bad_words_ids": [[[2], [3]]],
    "suppress_tokens": [list(range(2, 50))],
    "forced_eos_token_id": [3],
    "min_length": [40],
    "max_length": [3],
    "num_return_sequences": [2],
    "return_dict_in_generate": [True],
}
"""Entries of config.json, and values that are not those of the models here"""
IGNORED = {
    "attention_dropout",
    "max_window_layers",
    "pretraining_tp",
    "qk_norm",
    "anything",
    "temperature",
    "top_k",
}
"""Some that transformers does not read for text, and that people's files hold: they must not be refused"""
POLICY_READS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "query_pre_attn_scalar",
}
"""Entries that the policy is built from: the tests of logits change these"""
HARMLESS = {
    # transformers' own names for others, and of classes, not of files
    "is_heterogeneous",
    "name_or_path",
    "sub_configs",
    "default_rope_type",
    # looked for in every configuration that generates; the local engine gives its own generation settings
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "begin_suppress_tokens",
    "diversity_penalty",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "length_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "output_scores",
    "remove_invalid_values",
    "target_lookbehind",
    "vision_aspect_ratio",
    "vision_feature_layer",
    "vision_feature_select_strategy",
}


def with_config(model: Path, target: Path, change: dict[str, Any]) -> Path:
    """The model with other entries in config.json."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | change))
    return target


def engine_of(path: Path) -> LocalEngine:
    return LocalEngine(str(path), TOKENIZER, torch.float32, torch.device("cpu"), 1)


def generated(path: Path) -> tuple[list[int], np.ndarray]:
    """Tokens and log-probs of a sample of the local engine."""
    [sample] = engine_of(path).generate([Request(PROMPT, 3)], Sampling(1.0, 6))
    return sample.token_ids.tolist(), sample.log_probs


@pytest.mark.parametrize("family", FAMILIES)
def test_other_values_are_refused_or_change_nothing(
    family: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Long enough a prompt for a window of 4, with the cache that generation uses."""
    tokens, log_probs = generated(model_dirs[family])
    # the others share the code that reads what is not in ACCEPTED
    keys = OTHER if family == "llama3" else ACCEPTED.keys() | {"use_sliding_window", "head_dim", *IGNORED}
    computed, refused = COMPUTED.get(family, set()), set()
    keys = set(keys) - computed
    for key, value in [(name, other) for name in OTHER if name in keys for other in OTHER[name]]:
        path = with_config(model_dirs[family], tmp_path / "model", {key: value})
        try:
            supported_config(path)
        except UserError as error:
            assert "\n" not in str(error)
            assert f"{path}/config.json: " in str(error)
            refused.add(key)
            continue
        try:
            found = generated(path)
        except UserError as error:  # of weights whose shapes are others, or of an output layer
            assert "config.json requires" in str(error) or "lm_head.weight is missing" in str(error)
            continue
        assert found[0] == tokens, (key, value)
        np.testing.assert_allclose(found[1], log_probs, atol=1e-5, err_msg=f"{key} {value}")
    assert not refused & IGNORED
    always = {ACTIVATION.get(family, "hidden_act"), "kv_sharing_modes", "is_causal", "transformers_weights"}
    assert refused >= always | {"layer_types"} - computed


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_transformers_reads_is_looked_at_here(
    family: str, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that reads one more entry of config.json fails here: does the policy compute it?"""
    engine = engine_of(model_dirs[family])
    kind, read = type(engine.model.config), set()
    get = kind.__getattribute__

    def recording(self: object, name: str) -> object:
        read.add(name)
        return get(self, name)

    monkeypatch.setattr(kind, "__getattribute__", recording)
    type(engine.model)(engine.model.config)
    engine.generate([Request(PROMPT, 3)], Sampling(1.0, 6))
    monkeypatch.undo()
    entries = {name for name in read if not name.startswith("_") and not callable(getattr(kind, name, None))}
    assert entries >= {ACTIVATION.get(family, "hidden_act"), "layer_types", "rope_parameters"}
    assert entries - OTHER.keys() - POLICY_READS - HARMLESS == set()


def test_refusals_say_what_to_do(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    for family, change, words in (
        (
            "llama3",
            {"sliding_window": 8},
            "sliding_window is 8 in config.json, which the policy does not comp",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4096},
            "sliding_window is 4096 in config.json",
        ),
        (
            "qwen2",
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantized \(fp8\).*; dequantize them first",
        ),
        ("qwen2", {"model_type": "qwen3"}, "model_type is 'qwen3', but architectures names Qwen2ForCausalLM"),
        (
            "llama3",
            {"model_type": "mistral"},
            "model_type is 'mistral', but architectures names LlamaForCausalLM",
        ),
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads is 3 in config.json; it must divide"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0 in config.json"),
        ("gemma3", {"sliding_window": None}, "sliding_window is None in config.json; it must be a number of"),
        (
            "gemma3",
            {"sliding_window": 0},
            "sliding_window is 0 in config.json; it must be a number of at least",
        ),
        (
            "gemma3",
            {"layer_types": ["full_attention", "chunked_attention"]},
            r"layer_types is \['chunked_attention', 'full_attention'\] in config.json; the policy computes",
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0 in config.json, which"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "rope_type 'dynamic' of full_attention is not supported",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope_type 'yarn' of full_attention is not supported",
        ),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 0}}},
            "the rotary embedding of sliding_attention of config.json is damaged",
        ),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok is 9 in config.json; it must be at most",
        ),
    ):
        with pytest.raises(UserError, match=words):
            supported_config(with_config(model_dirs[family], tmp_path / "model", change))


def test_no_head_dim_is_hidden_size_over_heads(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Of Qwen2, whose class in transformers fails on null."""
    found = generated(with_config(model_dirs["qwen2"], tmp_path, {"head_dim": None}))
    assert found[0] == generated(model_dirs["qwen2"])[0]


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        ("qwen2", {}, 512),
        ("llama3", {}, 512),
        ("qwen3_yarn", {}, 512),
        ("qwen3_yarn", {"max_position_embeddings": 64}, 256),
        ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 1024),
        ("gemma3", {}, 512),
    ],
)
def test_positions(
    family: str, change: dict[str, Any], expected: int, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    assert positions(supported_config(with_config(model_dirs[family], tmp_path, change))) == expected


def test_verify_sees_a_cache_that_drops_tokens(model_dirs: dict[str, Path]) -> None:
    """A whole prompt at once does not: transformers' Llama has no window outside of its cache."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(2, 100, 200))
    model = load_transformers(model_dirs["llama3"], torch.float32)
    whole = model(tokens[None]).logits[0].detach()
    rows = torch.linspace(0, 199, 64).round().long()
    torch.testing.assert_close(cached_logits(model, tokens), whole[rows], atol=1e-4, rtol=0)
    model.config.sliding_window = 8
    assert (cached_logits(model, tokens) - whole[rows]).abs().max() > 0.1
    torch.testing.assert_close(model(tokens[None]).logits[0].detach(), whole, atol=1e-4, rtol=0)
