"""The policy's module: megatron-core's GPTModel that ends in log-probs instead of logits."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc.model.batch import PackedBatch
from megatron_bicc.model.families import PositionRotary, padded_vocab_size, rotary_frequencies
from megatron_bicc.model.gradient_sketch import GradientSketch
from megatron_bicc.model.layers import layer_specs
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard


class PolicyModel(GPTModel):
    """One pipeline stage's chunk of the policy.

    Its last stage returns float [2, N]: log-prob at the sampling temperature, and entropy, of each of the N
    response rows. Other stages return hidden states.
    """

    def __init__(
        self,
        megatron_config: TransformerConfig,
        hf_config: PretrainedConfig,
        temperature: float,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=layer_specs(megatron_config, vp_stage),
            vocab_size=padded_vocab_size(hf_config, megatron_config.tensor_model_parallel_size),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb = PositionRotary(rotary_frequencies(hf_config)[0])
        self.temperature = temperature
        self.true_vocab_size = hf_config.vocab_size
        self.sketch: GradientSketch | None = None
        """Takes the output layer's gradients of the backward pass; last stage only"""

    def run(self, packed: PackedBatch) -> Tensor:
        """Forward pass of a packed micro-batch."""
        return self(
            input_ids=packed.tokens_N[None],
            position_ids=packed.positions_N[None],
            attention_mask=None,
            labels=packed.labels_A,
            packed_seq_params=packed,
        )

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [padded vocabulary / TP, hidden]; last stage only."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def vocab_shard(self) -> VocabShard:
        """Which token ids `output_weight` holds."""
        group = parallel_state.get_tensor_model_parallel_group()
        rows = self.vocab_size // group.size()
        first = group.rank() * rows
        return VocabShard(first, min(rows, self.true_vocab_size - first), group)

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
                rows, self.output_weight(), labels, self.temperature, self.vocab_shard(), sketch
            )
        )
