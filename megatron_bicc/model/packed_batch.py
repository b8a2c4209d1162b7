"""A packed micro-batch on the device: the policy's input, and the rollout and token of each response row.

Shape suffixes: N rows of the micro-batch, A response rows, S responses, T response tokens of the step, R its
rollouts.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import pad

from megatron_bicc.model.segments import Segments, upload_segments
from megatron_bicc.packing.pack_cuda import DeviceRows
from megatron_bicc.packing.types import MicroBatch, MicroBatchLayout


@dataclass(kw_only=True)
class PackedBatch(PackedSeqParams):
    """Inputs of every pipeline stage for a micro-batch; passed through megatron-core as packed_seq_params.

    `qkv_format` stays "sbhd" with a batch of one: under "thd" megatron-core restarts the rotary positions at
    every segment, but a response's positions continue those of its prefix.
    """

    tokens_N: Tensor
    """int64 [N]"""
    positions_N: Tensor
    """int64 [N]"""
    labels_A: Tensor
    """int64 [A]: the token that each response row predicts"""
    response_A: Tensor
    """int64 [A]: response segment (0..S-1) of each response row"""
    token_A: Tensor
    """int64 [A]: index of the label among the T response tokens"""
    rollout_A: Tensor
    """int64 [A]: index of the rollout among the R"""
    scale_A: Tensor
    """float32 [A]: 1 / number of segments in the whole step that train this rollout"""
    response_rows: slice
    """The response rows among the N rows"""
    group_rows: list[tuple[int, slice]]
    """(group, its rows among the A response rows); a group may occur several times"""
    causal: Segments
    """Every segment attends to itself, causally"""
    cross: Segments
    """Every response attends to its side's prefix"""
    router_weight: float = 1.0
    """Weight of each response row in the routers' losses and counts, times its scale"""

    def router_weight_N(self) -> Tensor:
        """Returns every row's weight in the routers' losses and counts: float32 [N], 0 but for responses."""
        rows, count = self.response_rows, len(self.tokens_N)
        return pad(self.scale_A * self.router_weight, (rows.start, count - rows.stop))

    @classmethod
    def make(cls, batch: MicroBatch, device: torch.device) -> "PackedBatch":
        """Copies a micro-batch to `device`."""

        def to_device(array: np.ndarray, dtype: type = np.int64) -> Tensor:
            return torch.from_numpy(array.astype(dtype)).to(device)

        first, rows = batch.num_prefix_rows, batch.num_response_rows
        lengths_S = np.diff(batch.cu_response)
        on_device = DeviceRows(
            tokens_N=to_device(batch.tokens_N),
            positions_N=to_device(batch.positions_N),
            labels_A=to_device(batch.labels_N[first : first + rows]),
            token_A=to_device(batch.gather_A),
            response_A=to_device(np.repeat(np.arange(len(lengths_S)), lengths_S)),
            rollout_A=to_device(np.repeat(batch.rollout_S, lengths_S)),
            scale_A=to_device(np.repeat(batch.scale_S, lengths_S), np.float32),
        )
        return cls._of_rows(batch, on_device, *_segments(batch, device))

    @classmethod
    def make_all(
        cls, layouts: list[MicroBatchLayout], rows: list[DeviceRows], device: torch.device
    ) -> list["PackedBatch"]:
        """Returns micro-batches whose rows are on `device`; their segments go there in one copy."""
        segments = [part for layout in layouts for part in _segments(layout, torch.device("cpu"))]
        uploaded = iter(upload_segments(segments, device))
        return [
            cls._of_rows(layout, own, next(uploaded), next(uploaded))
            for layout, own in zip(layouts, rows, strict=True)
        ]

    @classmethod
    def _of_rows(
        cls, layout: MicroBatchLayout, rows: DeviceRows, causal: Segments, cross: Segments
    ) -> "PackedBatch":
        first = layout.num_prefix_rows
        return cls(
            qkv_format="sbhd",
            **vars(rows),
            response_rows=slice(first, first + layout.num_response_rows),
            group_rows=_group_rows(layout),
            causal=causal,
            cross=cross,
        )

    @classmethod
    def one_sequence(cls, tokens_N: Tensor) -> "PackedBatch":
        """Returns one causal sequence of tokens int64 [N], all of whose rows are prefix."""
        rows, where = len(tokens_N), tokens_N.device
        none_A, prefix = tokens_N[:0], np.array([0, rows], np.int32)
        return cls(
            qkv_format="sbhd",
            tokens_N=tokens_N,
            positions_N=torch.arange(rows, device=where),
            labels_A=none_A,
            response_A=none_A,
            token_A=none_A,
            rollout_A=none_A,
            scale_A=none_A.float(),
            response_rows=slice(rows, rows),
            group_rows=[],
            causal=Segments.of_themselves(prefix, where),
            cross=Segments.across(np.zeros(2, np.int32), prefix, where),
        )

    @classmethod
    def padding(cls, rows: int, device: torch.device) -> "PackedBatch":
        """Returns a micro-batch of padding only."""
        zeros_N, nothing = torch.zeros(rows, dtype=torch.long, device=device), np.array([0])
        return replace(
            cls.one_sequence(zeros_N),
            positions_N=zeros_N,
            response_rows=slice(0, 0),
            cross=Segments.across(nothing, nothing, device),
        )


def _segments(layout: MicroBatchLayout, device: torch.device) -> tuple[Segments, Segments]:
    """Returns the causal and the cross segments of a micro-batch."""
    return (
        Segments.of_themselves(layout.cu_seqlens, device),
        Segments.across(layout.cu_response_side, layout.cu_prefix, device),
    )


def _group_rows(batch: MicroBatchLayout) -> list[tuple[int, slice]]:
    """Returns PackedBatch.group_rows; adjacent responses of a group become one entry."""
    changes = np.flatnonzero(np.diff(batch.group_S)) + 1
    firsts = np.concatenate([np.zeros(min(1, len(batch.group_S)), int), changes])
    bounds = batch.cu_response[[*firsts, len(batch.group_S)]].tolist()
    return [(int(batch.group_S[s]), slice(*bounds[i : i + 2])) for i, s in enumerate(firsts)]
