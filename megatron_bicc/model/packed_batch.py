"""A packed micro-batch on the device: the policy's input, and the rollout and token of each response row.

Shape suffixes: N rows of the micro-batch that this context rank holds, A response rows among them, W chunks;
S responses of the whole micro-batch; T response tokens of the step, R its rollouts.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import pad

from megatron_bicc import device
from megatron_bicc.model.attention_calls import AttentionCalls
from megatron_bicc.model.attention_windows import WindowCall
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
    """int64 [A]: response segment (0..S-1) of each response row; the same number on all context ranks"""
    token_A: Tensor
    """int64 [A]: index of the label among the T response tokens"""
    rollout_A: Tensor
    """int64 [A]: index of the rollout among the R"""
    scale_A: Tensor
    """float32 [A]: 1 / number of segments in the whole step that train this rollout"""
    num_responses: int
    """S"""
    response_rows: slice
    """The response rows among the N rows"""
    group_rows: list[tuple[int, slice]]
    """(group, its rows among the A response rows); a group may occur several times"""
    attention: AttentionCalls
    experts: Tensor | None = None
    """uint8 or int16 [rows of this tensor-parallel rank, layers of this stage, experts per token]: what is
    replayed (model.routing); None: every router decides"""
    router_weight: float = 1.0
    """Weight of each response row in the routers' losses and counts, times its scale"""
    windows: dict[int, WindowCall] = field(default_factory=dict, init=False)
    """Calls of sliding layers by their window, made when the first of them asks"""

    def router_weight_N(self) -> Tensor:
        """Returns every row's weight in the routers' losses and counts: float32 [N], 0 but for responses."""
        rows, count = self.response_rows, len(self.tokens_N)
        return pad(self.scale_A * self.router_weight, (rows.start, count - rows.stop))

    def window_call(self, window: int) -> WindowCall:
        """Returns the call of layers whose rows see `window` keys; the host does not wait for its copy."""
        if window not in self.windows:
            call = WindowCall.of(self.attention, window)
            self.windows[window] = device.upload_tensors(call, self.tokens_N.device)
        return self.windows[window]

    @classmethod
    def make(cls, batch: MicroBatch, to: torch.device) -> "PackedBatch":
        """Copies a micro-batch to a device, in one copy."""
        first, rows, response_W, length_W = _responses(batch, batch.context_rank)
        response_A = np.repeat(response_W, length_W)

        def tensor(array: np.ndarray, dtype: type = np.int64) -> Tensor:
            return torch.from_numpy(array.astype(dtype))

        on_host = DeviceRows(
            tokens_N=tensor(batch.tokens_N),
            positions_N=tensor(batch.positions_N),
            labels_A=tensor(batch.labels_N[first : first + rows]),
            token_A=tensor(batch.gather_A),
            response_A=tensor(response_A),
            rollout_A=tensor(batch.rollout_S[response_A]),
            scale_A=tensor(batch.scale_S[response_A], np.float32),
        )
        calls = AttentionCalls.of(batch, batch.context_rank)
        return cls._of_rows(batch, batch.context_rank, *device.upload_tensors((on_host, calls), to))

    @classmethod
    def make_all(
        cls,
        layouts: list[MicroBatchLayout],
        rows: list[DeviceRows],
        context_rank: int,
        to: torch.device,
    ) -> list["PackedBatch"]:
        """Returns micro-batches whose rows are on a device; what else they need goes there in one copy.

        rows: those of the context rank.
        """
        calls = device.upload_tensors([AttentionCalls.of(layout, context_rank) for layout in layouts], to)
        return [
            cls._of_rows(layout, context_rank, *own)
            for layout, *own in zip(layouts, rows, calls, strict=True)
        ]

    @classmethod
    def _of_rows(
        cls, layout: MicroBatchLayout, context_rank: int, rows: DeviceRows, calls: AttentionCalls
    ) -> "PackedBatch":
        first, count, response_W, length_W = _responses(layout, context_rank)
        return cls(
            qkv_format="sbhd",
            **vars(rows),
            num_responses=len(layout.rollout_S),
            response_rows=slice(first, first + count),
            group_rows=_group_rows(layout.group_S[response_W], length_W),
            attention=calls,
        )

    @classmethod
    def one_sequence(cls, tokens_N: Tensor) -> "PackedBatch":
        """Returns one causal sequence of tokens int64 [N], all of whose rows are prefix.

        With context parallel every context rank computes all of it.
        """
        rows, where = len(tokens_N), tokens_N.device
        none_A = tokens_N[:0]
        return cls(
            qkv_format="sbhd",
            tokens_N=tokens_N,
            positions_N=torch.arange(rows, device=where),
            labels_A=none_A,
            response_A=none_A,
            token_A=none_A,
            rollout_A=none_A,
            scale_A=none_A.float(),
            num_responses=0,
            response_rows=slice(rows, rows),
            group_rows=[],
            attention=device.upload_tensors(AttentionCalls.of_one_segment(rows), where),
        )

    @classmethod
    def padding(cls, rows: int, to: torch.device) -> "PackedBatch":
        """Returns a micro-batch of padding only."""
        zeros_N = torch.zeros(rows, dtype=torch.long, device=to)
        return replace(cls.one_sequence(zeros_N), positions_N=zeros_N, response_rows=slice(0, 0))


def _responses(layout: MicroBatchLayout, context_rank: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Returns (first response row, response rows A, response of each chunk of one, its rows) of a rank."""
    own, sides = layout.chunks[context_rank], len(layout.cu_prefix) - 1
    is_response_W = own.segment_W >= sides
    length_W = own.length_W[is_response_W]
    first = int(own.length_W[~is_response_W].sum())
    return first, int(length_W.sum()), own.segment_W[is_response_W] - sides, length_W


def _group_rows(group_W: np.ndarray, length_W: np.ndarray) -> list[tuple[int, slice]]:
    """Returns PackedBatch.group_rows; adjacent chunks of a group become one entry."""
    changes = np.flatnonzero(np.diff(group_W)) + 1
    firsts = np.concatenate([np.zeros(min(1, len(group_W)), int), changes])
    offsets = np.concatenate([[0], np.cumsum(length_W)])
    bounds = offsets[[*firsts, len(group_W)]].tolist()
    return [(int(group_W[w]), slice(*bounds[i : i + 2])) for i, w in enumerate(firsts)]
