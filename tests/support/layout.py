"""Packed batches laid out by hand."""

import numpy as np
import torch

from megatron_bicc.packing.types import MicroBatch
from megatron_bicc.policy.packed import PackedBatch


def causal_batch(tokens: torch.Tensor) -> PackedBatch:
    """One causal sequence whose rows all belong to the prefix but the last."""
    ids, length = tokens.numpy().astype(np.int32), len(tokens)
    return PackedBatch.make(
        MicroBatch(
            tokens_T=ids,
            positions_T=np.arange(length, dtype=np.int32),
            labels_T=np.zeros(length, np.int32),
            num_prefix_rows=length,
            num_response_rows=0,
            cu_seqlens=np.array([0, length], np.int32),
            cu_prefix=np.array([0, length], np.int32),
            cu_response_side=np.array([0, 0], np.int32),
            cu_response=np.array([0], np.int32),
            rollout_S=np.zeros(0, np.int32),
            group_S=np.zeros(0, np.int32),
            scale_S=np.zeros(0, np.float32),
            gather=np.zeros(0, np.int64),
            channels=np.zeros((0, 0), np.float32),
        ),
        torch.device("cpu"),
    )
