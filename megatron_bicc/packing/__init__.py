"""From scored groups to packed micro-batches: `pack` (csrc) and its oracle `pack_reference` (NumPy)."""

from megatron_bicc.packing.native import pack
from megatron_bicc.packing.plan import Context, ContextPart, SideTable, StepPlan
from megatron_bicc.packing.reference import pack_reference
from megatron_bicc.packing.sides import PackedSide, packed_sides
from megatron_bicc.packing.types import MicroBatch, PackingSettings, RolloutBatch

__all__ = [
    "Context",
    "ContextPart",
    "MicroBatch",
    "PackedSide",
    "PackingSettings",
    "RolloutBatch",
    "SideTable",
    "StepPlan",
    "pack",
    "pack_reference",
    "packed_sides",
]
