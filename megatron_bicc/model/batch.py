"""A packed micro-batch as the policy reads it: tensors on the device, and the boundaries of its attention.

Shape suffixes: T rows, N response rows, S response segments.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_bicc.model.segments import Segments
from megatron_bicc.packing.types import MicroBatch


@dataclass
class PackedBatch(PackedSeqParams):
    """What every pipeline stage needs of a micro-batch; rides through megatron-core as packed_seq_params.

    `qkv_format` stays "sbhd" with a batch of one: under "thd" megatron-core restarts the rotary positions at
    every segment, and a response's positions go on from its prefix.
    """

    tokens_T: Tensor = None
    """int64 [T]"""
    positions_T: Tensor = None
    """int64 [T]"""
    labels_N: Tensor = None
    """int64 [N]: the token that each response row predicts"""
    response_N: Tensor = None
    """int64 [N]: response segment (0..S-1) of each response row"""
    response_rows: slice = None
    """The response rows among the T rows"""
    group_rows: list[tuple[int, slice]] = field(default_factory=list)
    """(group, its rows among the N response rows); a group may come several times"""
    causal: Segments = None
    cross: Segments = None

    @classmethod
    def make(cls, batch: MicroBatch, device: torch.device) -> "PackedBatch":
        """Tensors of a micro-batch on `device`."""
        to_long = lambda array: torch.from_numpy(array.astype(np.int64)).to(device)  # noqa: E731
        first, rows = batch.num_prefix_rows, batch.num_response_rows
        lengths_S = np.diff(batch.cu_response)
        return cls(
            qkv_format="sbhd",
            tokens_T=to_long(batch.tokens_T),
            positions_T=to_long(batch.positions_T),
            labels_N=to_long(batch.labels_T[first : first + rows]),
            response_N=to_long(np.repeat(np.arange(len(lengths_S)), lengths_S)),
            response_rows=slice(first, first + rows),
            group_rows=_group_rows(batch),
            causal=Segments.of_themselves(batch.cu_seqlens, device),
            cross=Segments.across(batch.cu_response_side, batch.cu_prefix, device),
        )

    @classmethod
    def padding(cls, rows: int, device: torch.device) -> "PackedBatch":
        """A micro-batch of nothing but padding."""
        zeros, cu, none = (
            torch.zeros(rows, dtype=torch.long, device=device),
            np.array([0, rows]),
            np.array([0]),
        )
        return cls(
            qkv_format="sbhd",
            tokens_T=zeros,
            positions_T=zeros,
            labels_N=zeros[:0],
            response_N=zeros[:0],
            response_rows=slice(0, 0),
            causal=Segments.of_themselves(cu, device),
            cross=Segments.across(none, none, device),
        )


def _group_rows(batch: MicroBatch) -> list[tuple[int, slice]]:
    """Neighbouring responses of a group are one entry."""
    changes = np.flatnonzero(np.diff(batch.group_S)) + 1
    firsts = np.concatenate([np.zeros(min(1, len(batch.group_S)), int), changes])
    bounds = batch.cu_response[[*firsts, len(batch.group_S)]].tolist()
    return [(int(batch.group_S[s]), slice(*bounds[i : i + 2])) for i, s in enumerate(firsts)]
