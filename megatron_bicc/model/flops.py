"""Counts the FLOPs of the policy's passes: a product of [a, b] by [b, c] counts 2abc."""

from dataclasses import dataclass

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
        inner = self.ffn * (self.experts or 1) + self.shared_ffn
        mlp = 3 * self.hidden * inner + self.hidden * self._gates
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + mlp) + embeddings

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
    """Size of the micro-batches on the data-parallel rank with the most work."""

    micro_batches: int
    rows: int
    response_rows: int
    pairs: int
    """Query-key pairs per attention head"""

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.micro_batches + other.micro_batches,
            self.rows + other.rows,
            self.response_rows + other.response_rows,
            self.pairs + other.pairs,
        )

    def times(self, passes: int) -> "Load":
        """Returns the load of that many passes."""
        return Load(
            passes * self.micro_batches,
            passes * self.rows,
            passes * self.response_rows,
            passes * self.pairs,
        )


NOTHING = Load(0, 0, 0, 0)


def load_of_batch(batch: MicroBatchLayout) -> Load:
    """Returns the load of a micro-batch."""
    causal = np.diff(batch.cu_seqlens).astype(np.int64)
    cross = np.diff(batch.cu_prefix).astype(np.int64) * np.diff(batch.cu_response_side)
    pairs = (causal * (causal + 1) // 2).sum() + cross.sum()
    return Load(1, batch.num_rows, batch.num_response_rows, int(pairs))


def forward_flops(sizes: Sizes, rows: Load) -> int:
    """Returns FLOPs of the whole policy's forward pass: products, attention over the pairs, and logits."""
    products = 2 * sizes.layers * sizes.products_a_layer * rows.rows
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * rows.pairs
    return products + attention + 2 * sizes.hidden * sizes.vocabulary * rows.response_rows


def flops_of(sizes: Sizes, plan: StepPlan) -> int:
    """Returns FLOPs of a forward pass over the micro-batches of all data-parallel ranks."""
    batches = (load_of_batch(batch) for rank in plan.ranks for batch in rank)
    return forward_flops(sizes, sum(batches, NOTHING))


def peak_flops(gpu: str) -> float | None:
    """Returns the peak dense bf16 FLOP/s of a GPU by its name; None for one that is not in BF16_FLOPS."""
    return next((peak for part, peak in BF16_FLOPS.items() if part in gpu), None)
