"""megatron-core's own configurations with the fields that a run sets by name (megatron.transformer, .ddp and
.optimizer in config.py), checked against the installed megatron-core.

A field that this package sets, or that it could not honour, is refused with the reason.
"""

import math
import reprlib
import types
from collections.abc import Iterator
from dataclasses import asdict, fields
from enum import EnumType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp4_utils import get_fp4_align_size
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bicc.config import Config, Rule, did_you_mean, flatten
from megatron_bicc.errors import UserError, first_line, shortened

MegatronCoreConfig = TypeVar(
    "MegatronCoreConfig", TransformerConfig, DistributedDataParallelConfig, OptimizerConfig
)
Refusals: TypeAlias = dict[str, tuple[str, ...]]
"""Names of refused fields by the reason, which ends the error's line"""

NAMES: dict[type, str] = {
    TransformerConfig: "megatron.transformer",
    DistributedDataParallelConfig: "megatron.ddp",
    OptimizerConfig: "megatron.optimizer",
}
"""The setting that holds the fields of each class"""

_FROM_MODEL = "it is part of the model, which config.json in model.path describes"
_ATTENTION = "attention is this package's own; choose its kernels with model.attention"
_CONTEXT = "rows are divided by the packer, and keys and values gathered over all parallel.context ranks"
_LOG_PROBS = "the output layer is this package's own, in chunks that never hold all logits"
_PIPELINE = "parallel.pipeline and parallel.virtual_pipeline decide it"
_WHOLE_LOSS = "losses are normalised over the whole step, so gradients are only summed"
_ALL_TOKENS = "every token reaches its experts: log-probs must not depend on the rest of a micro-batch"
_ROUTER_LOSSES = (
    "it is normalised by micro-batch: set loss.load_balancing_coefficient or loss.z_loss_coefficient"
)
_SHAPES = "CUDA graphs need equal shapes, and micro-batches differ in length"
_INFERENCE = "it is for inference, which the rollout engine does"
_WEIGHTS = "weights are read from model.path, not drawn"
_IN_DTYPE = "weights are kept in model.dtype, in which they are loaded, exported and synchronised"
_ADAMW = "the optimizer is AdamW"
_FP16 = "it is for fp16; the policy is float32 or bfloat16 (model.dtype)"
_GATHERED = "whole weights are needed right after an update, by the rollout engine: nothing could overlap"
_DDP = "the wrapper is DistributedDataParallel with the distributed optimizer"
_BUFFERS = "Transformer Engine's buffers for it need equal shapes, and micro-batches differ in length"
_SCHEDULE = "it needs a schedule of overlapping micro-batches that this package does not run"

REFUSED: dict[type, Refusals] = {
    TransformerConfig: {
        "set parallel.tensor": ("tensor_model_parallel_size",),
        "set parallel.sequence": ("sequence_parallel",),
        "set parallel.pipeline": ("pipeline_model_parallel_size",),
        "set parallel.virtual_pipeline": ("virtual_pipeline_model_parallel_size",),
        "set parallel.expert": ("expert_model_parallel_size",),
        "tensor parallel does not cut an expert": ("expert_tensor_parallel_size", "moe_extended_tp"),
        "set parallel.context": ("context_parallel_size",),
        _CONTEXT: (
            "hierarchical_context_parallel_sizes",
            "max_seqlen_per_dp_cp_rank",
            "hybrid_context_parallel",
            "cp_comm_type",
        ),
        "set model.dtype": ("params_dtype", "bf16", "fp16", "pipeline_dtype"),
        "activations are of model.dtype": ("enable_autocast", "autocast_dtype", "fp32_residual_connection"),
        "set model.recompute": ("recompute_granularity",),
        "set model.routing_replay": ("moe_enable_routing_replay",),
        "the policy has no dropout": ("hidden_dropout", "attention_dropout", "bias_dropout_fusion"),
        "it is used where Transformer Engine is installed": ("transformer_impl", "moe_grouped_gemm"),
        _PIPELINE: (
            "variable_seq_lengths",
            "overlap_p2p_comm",
            "batch_p2p_comm",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
            "pipeline_model_parallel_comm_backend",
            "use_ring_exchange_p2p",
        ),
        _WHOLE_LOSS: ("calculate_per_token_loss",),
        _WEIGHTS: (
            "perform_initialization",
            "use_cpu_initialization",
            "init_method_std",
            "embedding_init_method_std",
            "init_model_with_meta_device",
        ),
        _IN_DTYPE: ("fp8_param", "fp4_param"),
        _SHAPES: (
            "enable_cuda_graph",
            "external_cuda_graph",
            "cuda_graph_impl",
            "cuda_graph_scope",
            "cuda_graph_use_single_mempool",
            "cuda_graph_retain_backward_graph",
            "cuda_graph_warmup_steps",
        ),
        _SCHEDULE: (
            "overlap_moe_expert_parallel_comm",
            "delay_wgrad_compute",
            "ep_overlap_early_attn_memory_release",
        ),
        _BUFFERS: (
            "tp_comm_overlap",
            "tp_comm_overlap_ag",
            "tp_comm_overlap_rs",
            "tp_comm_overlap_rs_dgrad",
            "tp_comm_overlap_disable_qkv",
            "tp_comm_overlap_disable_fc1",
            "tp_comm_bulk_dgrad",
            "tp_comm_bulk_wgrad",
            "tp_comm_split_ag",
            "tp_comm_split_rs",
            "tp_comm_atomic_ag",
            "tp_comm_atomic_rs",
            "tp_comm_bootstrap_backend",
        ),
        _LOG_PROBS: (
            "cross_entropy_loss_fusion",
            "cross_entropy_fusion_impl",
            "defer_embedding_wgrad_compute",
            "wgrad_deferral_limit",
        ),
        _ATTENTION: (
            "attention_backend",
            "attention_softmax_in_fp32",
            "apply_query_key_layer_scaling",
            "masked_softmax_fusion",
            "softmax_type",
            "fp8_dot_product_attention",
            "fp8_multi_head_attention",
            "use_kitchen_attention",
            "kitchen_attention_backend",
            "fused_single_qkv_rope",
        ),
        _INFERENCE: (
            "flash_decode",
            "inference_rng_tracker",
            "inference_sampling_seed",
            "inference_fuse_tp_communication",
            "use_inference_optimized_layers",
            "mlp_chunks_for_prefill",
            "symmetric_ar_type",
            "test_mode",
        ),
        _ALL_TOKENS: (
            "moe_token_dropping",
            "moe_token_drop_policy",
            "moe_expert_capacity_factor",
            "moe_pad_expert_input_to_capacity",
            "moe_input_jitter_eps",
            "moe_router_force_load_balancing",
        ),
        _ROUTER_LOSSES: ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
        _FROM_MODEL: (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "ffn_hidden_size",
            "softmax_scale",
            "window_size",
            "window_attn_skip_freq",
            "normalization",
            "layernorm_epsilon",
            "layernorm_zero_centered_gamma",
            "apply_residual_connection_post_layernorm",
            "qk_layernorm",
            "qk_l2_norm",
            "qk_clip",
            "qk_clip_alpha",
            "qk_clip_threshold",
            "log_max_attention_logit",
            "attention_output_gate",
            "add_bias_linear",
            "add_qkv_bias",
            "gated_linear_unit",
            "activation_func_clamp_value",
            "glu_linear_offset",
            "rotary_interleaved",
            "no_rope_freq",
            "mrope_section",
            "multi_latent_attention",
            "experimental_attention_variant",
            "dsa_indexer_n_heads",
            "dsa_indexer_head_dim",
            "dsa_indexer_topk",
            "dsa_indexer_loss_coeff",
            "dsa_indexer_use_sparse_loss",
            "linear_attention_freq",
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "num_moe_experts",
            "moe_ffn_hidden_size",
            "moe_layer_freq",
            "moe_latent_size",
            "moe_router_topk",
            "moe_router_topk_limited_devices",
            "moe_router_topk_scaling_factor",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_pre_softmax",
            "moe_router_score_function",
            "moe_router_enable_expert_bias",
            "moe_router_bias_update_rate",
            "moe_apply_probs_on_input",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_shared_expert_overlap",
            "mtp_num_layers",
            "mtp_loss_scaling_factor",
            "mtp_standalone",
            "is_hybrid_model",
            "mamba_state_dim",
            "mamba_head_dim",
            "mamba_num_groups",
            "mamba_num_heads",
            "use_mamba_mem_eff_path",
            "heterogeneous_block_specs",
            "hetereogenous_dist_checkpoint",
        ),
    },
    DistributedDataParallelConfig: {
        _DDP: (
            "use_distributed_optimizer",
            "num_distributed_optimizer_instances",
            "use_megatron_fsdp",
            "use_custom_fsdp",
            "data_parallel_sharding_strategy",
            "outer_dp_sharding_strategy",
            "suggested_communication_unit_size",
            "fsdp_double_buffer",
            "fsdp_manual_registration",
            "preserve_fp32_weights",
        ),
        "gradients are summed in fp32": ("grad_reduce_in_fp32",),
        "every gradient is checked before an update": ("check_for_nan_in_grad", "check_for_large_grads"),
        _WHOLE_LOSS: ("average_in_collective",),
        _IN_DTYPE: ("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag", "keep_fp8_transpose_cache"),
        _GATHERED: ("overlap_param_gather", "align_param_gather"),
        _SCHEDULE: ("delay_wgrad_compute",),
    },
    OptimizerConfig: {
        "set optimizer.lr": ("lr", "decoupled_lr"),
        "set optimizer.min_lr": ("min_lr", "decoupled_min_lr"),
        "set optimizer.weight_decay": ("weight_decay",),
        "set optimizer.beta1": ("adam_beta1",),
        "set optimizer.beta2": ("adam_beta2",),
        "set optimizer.eps": ("adam_eps",),
        "set optimizer.clip_grad": ("clip_grad",),
        "set model.dtype": ("bf16", "fp16", "params_dtype"),
        _GATHERED: ("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        _ADAMW: (
            "optimizer",
            "decoupled_weight_decay",
            "sgd_momentum",
            "muon_momentum",
            "muon_split_qkv",
            "muon_use_nesterov",
            "muon_scale_mode",
            "muon_fp32_matmul_prec",
            "muon_num_ns_steps",
            "muon_tp_mode",
            "muon_extra_scale_factor",
        ),
        _DDP: ("use_distributed_optimizer",),
        _FP16: (
            "loss_scale",
            "initial_loss_scale",
            "min_loss_scale",
            "loss_scale_window",
            "hysteresis",
        ),
        _IN_DTYPE: ("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"),
    },
}

NEEDS_TE = (
    "fp8",
    "fp4",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "use_te_activation_func",
    "use_te_rng_tracker",
    "apply_rope_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
    "use_precision_aware_optimizer",
)
"""Fields that need Transformer Engine"""
TE_MODULES = ("layernorm", "moe_act")
"""Likewise, entries of recompute_modules"""

NUMBER = Rule(at_least=0, below=2**63)
"""Range of every number that RANGES does not name"""
RANGES: dict[str, Rule] = {
    "bucket_size": Rule(at_least=1, below=2**63),
    "fp8_amax_history_len": Rule(at_least=1, below=2**63),
    "fp8_interval": Rule(at_least=1, below=2**63),
    "microbatch_group_size_per_vp_stage": Rule(at_least=1, below=2**63),
    "moe_deepep_num_sms": Rule(at_least=1, below=2**63),
    "moe_hybridep_num_sms": Rule(at_least=1, below=2**63),
    "optimizer_offload_fraction": Rule(at_least=0, at_most=1),
    # of 0 layers, megatron-core's loop over the units of uniform recomputation would not end
    "recompute_num_layers": Rule(at_least=1, below=2**63),
}
"""Ranges by the name of the field"""

NEEDED: dict[str, tuple[str, ...]] = {
    "model.recompute=selective": ("megatron.transformer.recompute_modules",),
    "model.recompute=full": (
        "megatron.transformer.recompute_method",
        "megatron.transformer.recompute_num_layers",
        "megatron.transformer.distribute_saved_activations",
    ),
    "megatron.transformer.cpu_offloading=true": (
        "megatron.transformer.cpu_offloading_num_layers",
        "megatron.transformer.cpu_offloading_activations",
        "megatron.transformer.cpu_offloading_weights",
        "megatron.transformer.cpu_offloading_double_buffering",
    ),
    "megatron.transformer.fine_grained_activation_offloading=true": (
        "megatron.transformer.offload_modules",
        "megatron.transformer.min_offloaded_tensor_size",
    ),
    "megatron.optimizer.optimizer_cpu_offload=true": (
        "megatron.optimizer.optimizer_offload_fraction",
        "megatron.optimizer.use_torch_optimizer_for_cpu_offload",
        "megatron.optimizer.overlap_cpu_optimizer_d2h_h2d",
        "megatron.optimizer.pin_cpu_grads",
        "megatron.optimizer.pin_cpu_params",
    ),
}
"""Fields that have no effect without another setting, by that setting"""


class _YamlRepr(reprlib.Repr):
    """Shows a value in an error line, in the spelling of YAML and short."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 100

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print more than 4300 digits in base 10
        return shortened(str(value) if value.bit_length() < 4300 else hex(value))


_shown = _YamlRepr().repr


def megatron_core_config(cls: type[MegatronCoreConfig], config: Config, **own: Any) -> MegatronCoreConfig:
    """Returns a configuration of megatron-core: this package's fields, then those that the run sets.

    Raises UserError, one line, as `check_fields` does, and for values that megatron-core refuses together.
    """
    given = check_fields(cls, config)
    try:
        return cls(**(own | given))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if not given:
            raise
        shown = ", ".join(f"{NAMES[cls]}.{name}" for name in given)
        raise UserError(f"{shown}: megatron-core refuses them in this run: {first_line(error)}") from error


def row_alignment(config: Config) -> int:
    """Returns what a rank's number of rows in every micro-batch must be a multiple of.

    Sequence parallel splits rows evenly over the tensor-parallel ranks; products in 8 or 4 bits take whole
    blocks of rows on each.
    """
    given = check_fields(TransformerConfig, config)
    block = 1
    if given.get("fp8"):
        block = get_fp8_align_size(given.get("fp8_recipe", "delayed"))
    elif given.get("fp4"):
        block = get_fp4_align_size(given.get("fp4_recipe", "nvfp4"))
    return config.parallel.tensor * block


def check_megatron_settings(config: Config) -> None:
    """Raises UserError for the first field that the run sets and that is refused, by itself or with others.

    By itself: see `check_field`. With others: a field that has no effect without another setting.
    """
    for cls in NAMES:
        check_fields(cls, config)
    values = flatten(asdict(config))
    for needed, names in NEEDED.items():
        setting, _, expected = needed.partition("=")
        for name in names:
            if values.get(name) and str(values.get(setting)).lower() != expected:
                raise UserError(
                    f"{name} is {_shown(values[name])}; it has no effect without {needed}: "
                    "set that, or remove it"
                )
    if values.get("megatron.optimizer.optimizer_cpu_offload") and not values.get(
        "megatron.optimizer.optimizer_offload_fraction"
    ):
        raise UserError(
            "megatron.optimizer.optimizer_cpu_offload is true, but megatron-core moves only the share "
            "megatron.optimizer.optimizer_offload_fraction to the host, which is 0: set it, 1.0 for all"
        )


def check_fields(cls: type[MegatronCoreConfig], config: Config) -> dict[str, Any]:
    """Returns the fields of `cls` that the run sets, in their types. Raises UserError: see `check_field`."""
    section = NAMES[cls]
    given: dict[str, Any] = getattr(config.megatron, section.rpartition(".")[2])
    return {name: check_field(f"{section}.{name}", value) for name, value in given.items()}


def check_field(setting: str, value: Any) -> Any:
    """Returns the value of a field, such as megatron.ddp.bucket_size, in the field's type.

    Raises UserError, one line, for a name that the class does not have, a value of another type or out of
    range, and a field that this package sets itself or cannot honour.
    """
    section, _, name = setting.rpartition(".")
    shown = f"{section}.{shortened(name)}"
    cls = next(cls for cls, its_section in NAMES.items() if its_section == section)
    reasons = {name: reason for reason, names in REFUSED[cls].items() for name in names}
    known = {field.name for field in fields(cls)}
    if name in reasons:
        raise UserError(f"{shown} cannot be set: {reasons[name]}")
    if name not in known:
        hint = did_you_mean(name, sorted(known - reasons.keys()))
        raise UserError(
            f"{shown} is unknown: the installed megatron-core's {cls.__name__} has no field "
            f"{shortened(name)}{hint}"
        )
    kind = get_type_hints(cls)[name]
    expected = _in_words(kind)
    if expected in ("", "null"):
        raise UserError(f"{shown} cannot be set: it takes an object of Python")
    read = next(_readings(value, kind), None)
    if read is None:
        raise UserError(f"{shown} is {_shown(value)}; it must be {expected}{_whole(value, expected)}")
    (found,) = read
    if isinstance(found, int | float) and not isinstance(found, bool):
        rule = RANGES.get(name, NUMBER)
        if not rule.admits(found):
            raise UserError(f"{shown} is {_shown(value)}; it must be {rule.remedy}")
    if not HAVE_TE and _needs_te(name, value):
        raise UserError(
            f"{shown} is {_shown(value)}; it needs Transformer Engine, which is not installed "
            "(docs/policy.md)"
        )
    return found


def _whole(value: Any, expected: str) -> str:
    """Returns how to write a whole number that is given as 1e7, which YAML reads as text; otherwise ""."""
    number = next(_readings(value, float), (math.nan,))[0]
    if expected.startswith("a whole number") and number.is_integer() and abs(number) < 2**63:
        return f"; write {number:.0f}"
    return ""


def _needs_te(name: str, value: Any) -> bool:
    if name == "recompute_modules":
        return bool(value) and any(module in TE_MODULES for module in value)
    return name in NEEDS_TE and bool(value)


def _readings(value: Any, kind: Any) -> Iterator[tuple[Any]]:
    """Yields `value`, in a tuple, as a value of the type; nothing if it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for one in arguments:
            yield from _readings(value, one)
    elif origin is Literal:
        if value in arguments:
            yield (value,)
    elif origin in (list, tuple) and isinstance(value, list):
        items = [next(_readings(item, arguments[0]), None) for item in value]
        if None not in items and (origin is list or len(items) == len(arguments)):
            yield (origin(item for (item,) in items),)
    elif kind is float:
        # YAML reads 1e-3, without a dot, as text
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                yield (float(value),)
            except (OverflowError, ValueError):
                return
    elif kind in (bool, int, str):
        if type(value) is kind:
            yield (value,)
    elif kind is types.NoneType:
        if value is None:
            yield (None,)
    elif kind is torch.dtype:
        if isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype):
            yield (getattr(torch, value),)
    elif isinstance(kind, EnumType) and value in kind.__members__:
        yield (kind[value],)


def _in_words(kind: Any) -> str:
    """Returns the values that a type accepts, in words; empty for an object."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(filter(None, map(_in_words, arguments)))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is list:
        return f"a list, each {_in_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_in_words(arguments[0])}"
    if isinstance(kind, EnumType):
        return " or ".join(kind.__members__)
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "null",
        torch.dtype: "a type of torch, such as bfloat16",
    }
    return plain.get(kind, "")
