"""The parameters of a whole policy, and where a distributed checkpoint keeps them.

What a checkpoint holds for a policy is asked from megatron-core itself, of a policy built without memory.
"""

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from transformers import PretrainedConfig

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.policy.architecture import transformer_config
from megatron_bicc.policy.hf_mapping import Rule, cut, from_whole, join, rule_for, to_whole
from megatron_bicc.policy.model import PolicyModel


@dataclass(frozen=True)
class Piece:
    """A parameter of the whole policy, and its place in a tensor of the checkpoint."""

    rule: Rule
    key: str
    """Name of the checkpoint's tensor, which holds this parameter of every layer"""
    offset: tuple[int, ...]
    """Where the parameter starts in that tensor"""
    global_shape: tuple[int, ...]
    shape: torch.Size
    """The parameter's own shape; its missing leading dimensions are of size 1"""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.rule.hf_names(0)

    def to_megatron(self, tensors: list[Tensor], hf_config: PretrainedConfig) -> Tensor:
        """Hugging Face tensors -> the parameter."""
        return cut(self.rule.kind, to_whole(self.rule.kind, tensors, hf_config, 1), 0, 1, self.shape)

    def to_hf(self, parameter: Tensor, hf_config: PretrainedConfig) -> list[Tensor]:
        """The parameter -> Hugging Face tensors, in the order of `hf_names`."""
        return from_whole(self.rule.kind, join(self.rule.kind, [parameter], hf_config), hf_config)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The parameter's shape with all of the checkpoint's dimensions."""
        return (1,) * (len(self.global_shape) - len(self.shape)) + tuple(self.shape)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its place in the checkpoint's tensor, in torch's words."""
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.sizes))

    def hf_shapes(self, hf_config: PretrainedConfig) -> list[torch.Size]:
        """Shapes of the Hugging Face tensors."""
        return [x.shape for x in self.to_hf(torch.empty(self.shape, device="meta"), hf_config)]


def describe(hf_config: PretrainedConfig) -> tuple[list[Piece], list[ShardedObject]]:
    """What a checkpoint of this policy holds: its parameters, and megatron-core's own objects.

    megatron-core's process groups must have been made, without model parallel. Raises ValueError for an
    architecture that is not supported.
    """
    with platform.megatron(), torch.device("meta"):
        model = PolicyModel(transformer_config(hf_config, Config()), hf_config, temperature=1.0)
        state = model.sharded_state_dict()
    parameters = dict(model.named_parameters())
    pieces = [_piece(name, state[name], parameters[name].shape) for name in parameters if name in state]
    return pieces, [entry for entry in state.values() if isinstance(entry, ShardedObject)]


def _piece(name: str, entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size) -> Piece:
    # a gated linear's two halves are cut apart, one after the other: together they are the parameter
    first = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
    return Piece(rule_for(name, 0), first.key, tuple(first.global_offset), tuple(first.global_shape), shape)
