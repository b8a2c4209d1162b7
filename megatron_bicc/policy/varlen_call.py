"""What every kernel of variable-length attention is called with.

Shape suffixes: Q query rows, K key rows, H query heads, G key-value heads, D head dimension.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_bicc.policy.segments import Segments


@dataclass(frozen=True)
class VarlenCall:
    """Attention in which the rows of a segment see keys of that segment alone."""

    q_QHD: Tensor
    k_KGD: Tensor
    v_KGD: Tensor
    segments: Segments
    scale: float
    """Factor on q k"""
