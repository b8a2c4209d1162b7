"""Boundaries of a variable-length attention call."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_bicc.policy.tiles import Tile, make_tiles


@dataclass(frozen=True)
class Segments:
    """Boundaries on the host for CPU kernels, on the device for CUDA.

    Rows bounds_q[i]:bounds_q[i + 1] attend to keys bounds_k[i]:bounds_k[i + 1].
    """

    bounds_q: list[int]
    bounds_k: list[int]
    causal: bool
    """Row j of a segment sees its first j + 1 keys, and not all of them"""
    cu_q: Tensor
    """int32 [segments + 1], on the device"""
    cu_k: Tensor
    """int32 [segments + 1], on the device"""
    max_q: int
    max_k: int
    keyless_rows: Tensor | None
    """bool [queries]: rows whose segment has no keys; None where every segment has some"""

    @classmethod
    def of_themselves(cls, cu: np.ndarray, device: torch.device) -> "Segments":
        """Causal attention of segments to themselves; int32 cumulative lengths [segments + 1]."""
        lengths = np.diff(cu)
        cu = np.concatenate([[0], lengths[lengths > 0].cumsum()])
        return cls._make(cu, cu, True, device)

    @classmethod
    def across(cls, cu_q: np.ndarray, cu_k: np.ndarray, device: torch.device) -> "Segments":
        """Every query of a segment to all its keys; int32 cumulative lengths [segments + 1] of both."""
        return cls._make(cu_q, cu_k, False, device)

    @classmethod
    def _make(cls, cu_q: np.ndarray, cu_k: np.ndarray, causal: bool, device: torch.device) -> "Segments":
        q_lens, k_lens = np.diff(cu_q), np.diff(cu_k)
        keyless = np.repeat(k_lens == 0, q_lens)
        to_device = lambda cu: torch.from_numpy(cu.astype(np.int32)).to(device)  # noqa: E731
        return cls(
            bounds_q=cu_q.tolist(),
            bounds_k=cu_k.tolist(),
            causal=causal,
            cu_q=to_device(cu_q),
            cu_k=to_device(cu_k),
            max_q=int(q_lens.max(initial=0)),
            max_k=int(k_lens.max(initial=0)),
            keyless_rows=torch.from_numpy(keyless).to(device) if keyless.any() else None,
        )

    def ranges(self) -> list[tuple[slice, slice]]:
        """Query and key rows of every segment that has both."""
        q, k = self.bounds_q, self.bounds_k
        pairs = [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]
        return [(rows, keys) for rows, keys in pairs if rows.stop > rows.start and keys.stop > keys.start]

    @cached_property
    def tiles(self) -> list[Tile]:
        """The segments as the CPU kernel takes them; made once for all layers and passes."""
        return make_tiles(self.ranges(), self.causal)
