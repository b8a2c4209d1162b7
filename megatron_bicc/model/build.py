"""Builds the policy of megatron-core modules: configuration, layers, and a GPTModel that returns log-probs.

Shape suffixes: N rows of a micro-batch, A response rows of a micro-batch, C channels of a head.
"""

from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.attention import SharedPrefixCoreAttention, window_of
from megatron_bicc.model.families import (
    SHARED_EXPERT_SIZE,
    SLIDING,
    Family,
    attention_scale,
    check_layout,
    experts_type,
    family_of,
    head_dim,
    padded_vocab_size,
    rotary_frequencies,
)
from megatron_bicc.model.gradient_sketch import GradientSketch
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard
from megatron_bicc.model.megatron_settings import megatron_core_config
from megatron_bicc.model.moe_router import PolicyRouter
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.routing import RowReplay

Backend = Literal["Transformer Engine", "apex", "local"]


def backend() -> Backend:
    """Returns the fastest installed library for linears and norms; attention is always this package's."""
    if HAVE_TE:
        return "Transformer Engine"
    return "apex" if _has_apex() else "local"


def _norms(family: Family) -> Backend:
    """Returns the library of the norms: apex has none that adds 1 to its weight."""
    return "local" if family.norms_add_one and backend() == "apex" else backend()


def _has_apex() -> bool:
    """Returns whether NVIDIA's apex is installed; the project of that name on PyPI is another one."""
    apex = find_spec("apex")
    if apex is None:
        return False
    # by its place only: to look for a submodule by its full name would import the other project
    return PathFinder.find_spec("apex.normalization", apex.submodule_search_locations or []) is not None


def describe(hf_config: PretrainedConfig) -> str:
    """Returns one line for the log: the architecture, the library of its layers, and that dropout is 0."""
    layers = {
        "Transformer Engine": "Transformer Engine's linears and norms",
        "apex": "megatron-core's own linears and apex's norms",
        "local": "megatron-core's own linears and torch's norms",
    }[_norms(family_of(hf_config))]
    dropout = getattr(hf_config, "attention_dropout", 0.0)
    unused = f" (config.json's attention_dropout of {dropout} is not used)" if dropout else ""
    name = hf_config.architectures[0]
    return f"policy: {name} on {layers}, shared-prefix attention, dropout 0{unused}"


def transformer_config(hf_config: PretrainedConfig, config: Config) -> TransformerConfig:
    """Returns megatron-core's configuration of the policy; dropout is zero throughout.

    Raises UserError for an architecture that is not supported, or a layout that does not fit it.
    """
    family = family_of(hf_config)
    check_layout(hf_config, config.parallel)
    _check_router_losses(config, family)
    dtype = getattr(torch, config.model.dtype)
    found = megatron_core_config(
        TransformerConfig,
        config,
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        ffn_hidden_size=hf_config.intermediate_size,
        softmax_scale=attention_scale(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        layernorm_zero_centered_gamma=family.norms_add_one,
        qk_layernorm=family.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        gated_linear_unit=True,
        activation_func=gelu_tanh if family.gelu else torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # Every weight is read from a file. megatron-core still has to call its initialisation: it marks the
        # weights that tensor parallel cuts; on the device, as Transformer Engine's layers require.
        use_cpu_initialization=False,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # the loss is already normalised over the whole step: megatron-core must only sum its parts
        calculate_per_token_loss=True,
        variable_seq_lengths=config.parallel.pipeline > 1,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **_parallel(config),
        **_recompute(config),
        **(_experts(hf_config, family, config) if family.experts else {}),
        **(_windows(hf_config) if family.windows else {}),
    )
    _check_replay(config, found)
    if family.experts:
        # Set after construction: megatron-core refuses top-1 gates that sum to 1, since their router has no
        # gradient. transformers computes the same, so the policy has to.
        found.moe_router_pre_softmax = not hf_config.norm_topk_prob
    return found


def _check_router_losses(config: Config, family: Family) -> None:
    """Raises UserError for a loss of routers if the model has none."""
    for name in ("load_balancing_coefficient", "z_loss_coefficient"):
        coefficient = getattr(config.loss, name)
        if coefficient and not family.experts:
            raise UserError(f"loss.{name} is {coefficient}; the model has no experts: set it to 0")


def _leave(weight: Tensor) -> None:
    """Leaves a new weight's memory as it is."""


def _parallel(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        # one direction per call: with two stages, each is both the other's previous and its next stage
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": virtual == 1,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        # megatron-core requires it for variable sequence lengths
        "moe_token_dispatcher_type": "alltoall",
    }


def _experts(hf_config: PretrainedConfig, family: Family, config: Config) -> dict[str, Any]:
    shared = {
        "moe_shared_expert_intermediate_size": getattr(hf_config, SHARED_EXPERT_SIZE, None),
        "moe_shared_expert_gate": True,
    }
    return (shared if family.shared_expert else {}) | {
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        # its losses are of micro-batches; those of PolicyRouter are of the whole step
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": backend() == "Transformer Engine",
        "moe_enable_routing_replay": config.model.routing_replay != "none",
    }


def _check_replay(config: Config, found: TransformerConfig) -> None:
    """Raises UserError for a routing replay that the policy's routers cannot do."""
    replay = config.model.routing_replay
    if replay != "none" and not found.num_moe_experts:
        raise UserError(f"model.routing_replay is {replay}; the model has no experts: set it to none")
    if replay != "none" and found.moe_router_fusion:
        raise UserError(
            f"model.routing_replay is {replay} and megatron.transformer.moe_router_fusion is true; the fused "
            "router cannot be told its experts: remove moe_router_fusion"
        )


def _windows(hf_config: PretrainedConfig) -> dict[str, Any]:
    # what megatron-core calls a window leaves out the token itself
    return {
        "window_size": (hf_config.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(kind == SLIDING) for kind in hf_config.layer_types],
    }


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns gelu in its approximation by tanh."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def _recompute(config: Config) -> dict[str, Any]:
    if config.model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.model.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {}


def layer_specs(
    megatron_config: TransformerConfig, family: Family, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Returns the specs of this stage's layers and of the final norm."""
    c = megatron_config
    if backend() == "Transformer Engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
        layer = get_gpt_layer_with_transformer_engine_spec(
            c.num_moe_experts, c.moe_grouped_gemm, c.qk_layernorm
        )
        if c.num_moe_experts:
            # the name in checkpoints that megatron-core's own layers of experts give to this norm
            names = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
            layer.submodules.sharded_state_dict_keys_map = names
    else:
        norm = rms_norm(family)
        layer = _local_layer(c, norm)
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = SharedPrefixCoreAttention
    if family.windows:
        attention.module = WindowedSelfAttention
    if family.output_norms:
        add = ModuleSpec(NormThenAdd, params={"config": c, "norm": norm})
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = add
    if c.num_moe_experts:
        layer.submodules.mlp.submodules.router = PolicyRouter
    layers = get_num_layers_to_build(c, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _local_layer(c: TransformerConfig, norm: type[torch.nn.Module]) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        c.num_moe_experts, c.moe_grouped_gemm, c.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    if c.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = norm
    return layer


def rms_norm(family: Family) -> type[torch.nn.Module]:
    """Returns apex's or torch's RMSNorm as a class with the constructor that megatron-core calls."""
    if _norms(family) == "apex":
        from apex.normalization import FusedRMSNorm as Norm
    else:
        from torch.nn import RMSNorm as Norm

    class MegatronRMSNorm(Norm):
        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
            super().__init__(hidden_size, eps=eps)
            self.to(config.params_dtype)
            # Under sequence parallel each rank normalises its own rows only: megatron-core sums the
            # gradients of marked parameters over the tensor-parallel group.
            self.weight.sequence_parallel = config.sequence_parallel

    class AddOneRMSNorm(MegatronRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            # in fp32, as transformers: 1 + weight would lose most of a small weight in bf16
            weight = 1.0 + self.weight.float()
            return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)

    return AddOneRMSNorm if family.norms_add_one else MegatronRMSNorm


class NormThenAdd(torch.nn.Module):
    """megatron-core's bias-dropout-add, with a norm of what is added; there is no bias and no dropout."""

    def __init__(self, config: TransformerConfig, norm: type[torch.nn.Module]) -> None:
        """norm: a class with the constructor that megatron-core calls."""
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
        """Returns (output and bias, residual, dropout) -> their sum, as megatron-core calls it."""
        return lambda output_with_bias, residual, dropout: residual + self.norm(output_with_bias[0])


class WindowedSelfAttention(SelfAttention):
    """Self-attention of a model whose sliding layers have rotary angles of their own."""

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **others: Any) -> Any:
        """rotary_pos_emb: float32 [2, N, 1, 1, C], angles of layers without a window, then of others."""
        own = rotary_pos_emb[int(window_of(self.config, self.layer_number) is not None)]
        return super().forward(hidden_states, *args, rotary_pos_emb=own, **others)


class PositionRotary(torch.nn.Module):
    """Rotary angles of given positions."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        """inverse_frequencies: float32 [..., C / 2], as `rotary_frequencies` returns them."""
        super().__init__()
        self.inverse_frequencies = inverse_frequencies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionRotary":
        """Moves to the device of the weights; a buffer would be rounded to their type as well."""
        self.inverse_frequencies = self.inverse_frequencies.to(fn(self.inverse_frequencies).device)
        return super()._apply(fn, recurse)

    def forward(self, positions_N: Tensor) -> Tensor:
        """Returns angles float32 [..., N, 1, 1, C], megatron-core's layout, of position ids int64 [N]."""
        angles = positions_N.float()[:, None] * self.inverse_frequencies[..., None, :]
        return torch.cat([angles, angles], dim=-1)[..., None, None, :]


class PolicyModel(GPTModel):
    """One pipeline stage's chunk of the policy.

    Its last stage returns float [2, A]: log-prob at the sampling temperature, and entropy, of each of the A
    response rows. Other stages return hidden states.
    """

    def __init__(
        self,
        megatron_config: TransformerConfig,
        hf_config: PretrainedConfig,
        temperature: float,
        vp_stage: int | None = None,
        entropy_in_loss: bool = False,
    ) -> None:
        """entropy_in_loss: the entropy has a gradient, too (loss.entropy_coefficient)."""
        family = family_of(hf_config)
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=layer_specs(megatron_config, family, vp_stage),
            vocab_size=padded_vocab_size(hf_config, megatron_config.tensor_model_parallel_size),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            # megatron-core's own rotary embedding counts rows from 0; `_preprocess` gives it positions
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        self.rotary = PositionRotary(rotary_frequencies(hf_config)[0])
        self.output_norms = family.output_norms
        self.embedding_scale: float | None = None
        if family.scaled_embedding:
            # rounded to the type of the weights, as transformers does
            scale = torch.tensor(hf_config.hidden_size**0.5, device="cpu").to(megatron_config.params_dtype)
            self.embedding_scale = scale.item()
        self.temperature, self.entropy_in_loss = temperature, entropy_in_loss
        self.true_vocab_size = hf_config.vocab_size
        self.sketch: GradientSketch | None = None
        """Set while a backward pass's gradients of the output layer are to be sketched; last stage only"""
        self.records_experts = False
        """Whether forward passes keep their experts, for `experts`"""
        has_experts = megatron_config.num_moe_experts is not None
        self.routers: list[PolicyRouter] = [x.mlp.router for x in self.decoder.layers] if has_experts else []
        """Of this chunk's layers"""
        self._replays: list[RowReplay] = []
        if megatron_config.moe_enable_routing_replay:
            self._replays = [RowReplay() for _ in self.routers]
            for router, replay in zip(self.routers, self._replays, strict=True):
                router.router_replay = replay
        # the chunks of a rank have equal numbers of layers (families.check_layout)
        self._first_replay = (vp_stage or 0) * len(self._replays)

    def run(self, packed: PackedBatch) -> Tensor:
        """Runs the forward pass of a packed micro-batch."""
        if any(router.active for router in self.routers):
            own_N = self._rows_of_routers(packed.router_weight_N())
            for router in self.routers:
                router.weight_N.set(own_N)
        for layer, replay in enumerate(self._replays, self._first_replay):
            experts = None if packed.experts is None else packed.experts[:, layer]
            replay.start(experts, self.records_experts)
        return self(
            input_ids=packed.tokens_N[None],
            position_ids=packed.positions_N[None],
            attention_mask=None,
            labels=packed.labels_A,
            packed_seq_params=packed,
        )

    def experts(self) -> Tensor:
        """Returns the experts of the last forward pass: [this rank's rows, layers, experts per token]."""
        found = torch.stack([replay.get_recorded_indices() for replay in self._replays], dim=1)
        return found.to(getattr(torch, experts_type(self.config.num_moe_experts)))

    def forget_experts(self) -> None:
        """Drops what was replayed and recorded, at the end of a pass over micro-batches."""
        for replay in self._replays:
            replay.clear_indices()

    def _rows_of_routers(self, values_N: Tensor) -> Tensor:
        """Returns the values of the rows that this rank routes: sequence parallel splits all."""
        group = parallel_state.get_tensor_model_parallel_group()
        return values_N.chunk(group.size())[group.rank()] if self.config.sequence_parallel else values_N

    def output_weight(self) -> Tensor:
        """Returns this rank's rows of the output layer, [padded vocabulary / TP, hidden]; last stage only."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def vocab_shard(self) -> VocabShard:
        """Returns the token ids that `output_weight` holds."""
        group = parallel_state.get_tensor_model_parallel_group()
        rows = self.vocab_size // group.size()
        first = group.rank() * rows
        return VocabShard(first, min(rows, self.true_vocab_size - first), group)

    def _preprocess(self, *, packed_seq_params: PackedBatch, **inputs: Any) -> tuple[Any, ...]:
        """Adds the rotary angles of each row's position: a response's positions continue its prefix's."""
        decoder_input, _, *others = super()._preprocess(packed_seq_params=packed_seq_params, **inputs)
        if self.embedding_scale is not None and self.pre_process:
            decoder_input = decoder_input * self.embedding_scale
        return (decoder_input, self.rotary(packed_seq_params.positions_N), *others)

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor, packed_seq_params: PackedBatch, **_: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
        rows = hidden_states[packed_seq_params.response_rows, 0]
        sketch = None if self.sketch is None else partial(self.sketch.add, packed_seq_params.group_rows)
        return torch.stack(
            VocabParallelLogProbs.apply(
                rows,
                self.output_weight(),
                labels,
                self.temperature,
                self.vocab_shard(),
                self.entropy_in_loss,
                sketch,
            )
        )


def build_modules(
    megatron_config: TransformerConfig,
    hf_config: PretrainedConfig,
    temperature: float,
    device: torch.device,
    entropy_in_loss: bool = False,
) -> list[PolicyModel]:
    """Returns this rank's model chunks, one per virtual pipeline stage, with uninitialized weights."""
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    modules = [
        PolicyModel(megatron_config, hf_config, temperature, stage, entropy_in_loss) for stage in stages
    ]
    return [module.to(device, megatron_config.params_dtype) for module in modules]
