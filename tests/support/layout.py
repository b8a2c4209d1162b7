"""Packed batches built by hand."""

import numpy as np
import torch

from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.packing.types import Chunks, MicroBatch


def causal_batch(tokens: torch.Tensor) -> PackedBatch:
    """Returns one causal sequence whose rows all belong to the prefix."""
    ids = tokens.numpy().astype(np.int32)
    return PackedBatch.make(_one_sequence(ids, np.zeros_like(ids), len(ids)), torch.device("cpu"))


def row_batch(tokens: np.ndarray) -> PackedBatch:
    """Returns one causal sequence of tokens int32 [N + 1], all of whose N rows are a response."""
    return PackedBatch.make(_one_sequence(tokens[:-1], tokens[1:], 0), torch.device("cpu"))


def _one_sequence(tokens_N: np.ndarray, labels_N: np.ndarray, prefix: int) -> MicroBatch:
    """Returns a side with one response (none if the prefix takes all rows)."""
    length, response = len(tokens_N), len(tokens_N) - prefix
    cu = lambda *lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)  # noqa: E731
    segments = [response] if response else []
    return MicroBatch(
        num_rows=length,
        tokens_N=tokens_N,
        positions_N=np.arange(length, dtype=np.int32),
        labels_N=labels_N,
        num_prefix_rows=prefix,
        num_response_rows=response,
        cu_seqlens=cu(prefix, *segments),
        cu_prefix=cu(prefix),
        cu_response_side=cu(response),
        cu_response=cu(*segments),
        rollout_S=np.zeros(len(segments), np.int32),
        group_S=np.zeros(len(segments), np.int32),
        scale_S=np.ones(len(segments), np.float32),
        gather_A=np.arange(response),
        chunks=(Chunks.of_whole([prefix, *segments], length),),
        context_rank=0,
    )
