"""The sizes of a policy that memory and work depend on."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_bicc.policy.architecture import family_of
from megatron_bicc.policy.rotary import head_dim


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
    """Of the MLP, or of one expert"""
    experts: int
    """0 for a dense model"""
    experts_a_token: int
    vocabulary: int
    qk_norm: bool
    tied: bool

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> "Sizes":
        """From a supported Hugging Face configuration. Raises ValueError for another."""
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
            vocabulary=hf_config.vocab_size,
            qk_norm=family.qk_norm,
            tied=hf_config.tie_word_embeddings,
        )

    @property
    def products_a_layer(self) -> int:
        """Weights that a token is multiplied with in a layer, of its own experts alone."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        mlps = self.experts_a_token or 1
        return attention + 3 * self.hidden * self.ffn * mlps + self.hidden * self.experts

    @property
    def parameters(self) -> int:
        """Elements of all matrices; norms and biases are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        mlp = 3 * self.hidden * self.ffn * (self.experts or 1) + self.hidden * self.experts
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + mlp) + embeddings

    @property
    def kv_bytes_a_token(self) -> int:
        """Keys and values of a token in bf16, all layers."""
        return 2 * 2 * self.layers * self.groups * self.head_dim
