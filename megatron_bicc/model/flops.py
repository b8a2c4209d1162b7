"""Counts the FLOPs of the policy's passes: a product of [a, b] by [b, c] counts 2abc.

Shape suffixes: W chunks of a context rank, S responses of a micro-batch, X its segments: prefixes, responses.
"""

from dataclasses import astuple, dataclass, replace

import numpy as np
from transformers import PretrainedConfig

from megatron_bicc.model.families import family_of, head_dim
from megatron_bicc.packing.types import MicroBatchLayout, StepPlan

BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}
"""Peak dense FLOP/s by a part of the GPU's name, as CUDA reports it; the first that a name contains counts.

Source: NVIDIA's data sheets (A100 2021, H100 2023, H200 2024, B200 and GB200 2024), sparse figures halved."""


@dataclass(frozen=True)
class Sizes:
    """A policy's dimensions."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key-value heads"""
    head_dim: int
    ffn: int
    """Inner size of an MLP, or of one expert"""
    experts: int
    """0 for a dense model"""
    experts_a_token: int
    shared_ffn: int
    """Inner size of the expert that every token passes; 0 without one"""
    vocabulary: int
    qk_norm: bool
    tied: bool

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> "Sizes":
        """Reads a Hugging Face configuration. Raises UserError if it is not supported."""
        family = family_of(hf_config)
        return cls(
            layers=hf_config.num_hidden_layers,
            hidden=hf_config.hidden_size,
            heads=hf_config.num_attention_heads,
            groups=hf_config.num_key_value_heads,
            head_dim=head_dim(hf_config),
            ffn=hf_config.moe_intermediate_size if family.experts else hf_config.intermediate_size,
            experts=hf_config.num_experts if family.experts else 0,
            experts_a_token=hf_config.num_experts_per_tok if family.experts else 0,
            shared_ffn=hf_config.shared_expert_intermediate_size if family.shared_expert else 0,
            vocabulary=hf_config.vocab_size,
            qk_norm=family.qk_norm,
            tied=hf_config.tie_word_embeddings,
        )

    @property
    def products_a_layer(self) -> int:
        """Weights of a layer that a token is multiplied by: only those of the experts it is routed to."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        mlps = self.experts_a_token or 1
        inner = self.ffn * mlps + self.shared_ffn
        return attention + 3 * self.hidden * inner + self.hidden * self._gates

    @property
    def parameters(self) -> int:
        """Elements of all matrices, without norms and biases."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        ffn = self.shared_ffn if self.experts else self.ffn
        mlp = 3 * self.hidden * ffn + self.hidden * self._gates
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + mlp) + self.expert_parameters + embeddings

    @property
    def expert_parameters(self) -> int:
        """Elements of all experts' matrices."""
        return self.layers * self.experts * 3 * self.hidden * self.ffn

    @property
    def _gates(self) -> int:
        """Outputs of a layer's router, and of the shared expert's gate."""
        return self.experts + bool(self.shared_ffn)

    @property
    def kv_bytes_a_token(self) -> int:
        """Bytes of one token's keys and values in bf16, over all layers."""
        return 2 * 2 * self.layers * self.groups * self.head_dim


@dataclass(frozen=True)
class Load:
    """Size of micro-batches, as far as one context rank holds them."""

    micro_batches: int
    rows: int
    response_rows: int
    pairs: int
    """Query-key pairs per attention head"""
    shared_rows: int = 0
    """Rows whose keys and values each context rank sends to the others in every layer: those of prefixes and
    of segments that are cut, as many as on the rank with most of them; 0 with one context rank"""

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, passes: int) -> "Load":
        """Returns the load of that many passes."""
        return Load(*(passes * figure for figure in astuple(self)))


NOTHING = Load(0, 0, 0, 0)


def loads_of_batch(batch: MicroBatchLayout) -> list[Load]:
    """Returns the load of each context rank of a micro-batch."""
    sides = len(batch.cu_prefix) - 1
    # rows of the side's prefix, to which every row of a response attends
    prefix_X = np.concatenate([np.zeros(sides, np.int64), batch.segment_rows[batch.side_S]])
    is_shared_X = batch.shared_segments
    loads = []
    for own in batch.chunks:
        length_W = own.length_W.astype(np.int64)
        padding = own.num_rows - int(length_W.sum())  # attends to itself, causally
        earlier = (length_W * (own.start_W + prefix_X[own.segment_W])).sum()
        causal = (length_W * (length_W + 1) // 2).sum() + padding * (padding + 1) // 2
        response_rows = length_W[own.segment_W >= sides].sum()
        shared_rows = length_W[is_shared_X[own.segment_W]].sum()
        loads.append(Load(1, own.num_rows, int(response_rows), int(earlier + causal), int(shared_rows)))
    most = max(load.shared_rows for load in loads) if len(loads) > 1 else 0
    return [replace(load, shared_rows=most) for load in loads]


def forward_flops(sizes: Sizes, rows: Load) -> int:
    """Returns FLOPs of the whole policy's forward pass: products, attention over the pairs, and logits."""
    products = 2 * sizes.layers * sizes.products_a_layer * rows.rows
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * rows.pairs
    return products + attention + 2 * sizes.hidden * sizes.vocabulary * rows.response_rows


def flops_of(sizes: Sizes, plan: StepPlan) -> int:
    """Returns FLOPs of a forward pass over the micro-batches of all data- and context-parallel ranks."""
    loads = (load for rank in plan.ranks for batch in rank for load in loads_of_batch(batch))
    return forward_flops(sizes, sum(loads, NOTHING))


def peak_flops(gpu: str) -> float | None:
    """Returns the peak dense bf16 FLOP/s of a GPU by its name; None for one that is not in BF16_FLOPS."""
    return next((peak for part, peak in BF16_FLOPS.items() if part in gpu), None)
