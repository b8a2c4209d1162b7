"""The steps that are taken on a fake cuda:0; imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one rank, the first of its layout or that of the second pipeline stage."""

    model: Literal["qwen3_tied", "qwen3_moe"] = "qwen3_tied"
    backend: Literal["local", "Transformer Engine"] = "local"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    stage: int | None = None
    """Of two pipeline stages; None: no pipeline"""
    recompute: Literal["none", "selective", "full"] = "none"
    kernels: bool = False
    """csrc's CUDA kernels in place of plain torch; only the shapes of what they return are computed"""
    layers: int = 1
    """Of this stage"""
    algorithm: Literal["bicc", "grpo", "gspo+bicc"] = "grpo"
    """bicc: both packings, the reference policy, and a pass for the conditioned denominator"""
    replay: Literal["none", "old", "engine"] = "none"
    """model.routing_replay; old: with bicc's plain denominator, whose pass is of other micro-batches"""

    @property
    def processes(self) -> int:
        """Number of processes of the layout."""
        return self.tensor * self.context * (1 if self.stage is None else 2)

    @property
    def rank(self) -> int:
        """The rank that is played: tensor- and context-parallel rank 0 of the stage."""
        return self.tensor * self.context * (self.stage or 0)


TE = "Transformer Engine"
CASES = {
    "bicc": Case(algorithm="bicc"),
    "dense": Case(),
    "dense, 2 layers": Case(layers=2),
    "kernels": Case(kernels=True),
    "kernels, 2 layers": Case(kernels=True, layers=2),
    "kernels bicc": Case(kernels=True, algorithm="bicc"),
    "kernels tp2 sp full": Case(kernels=True, tensor=2, sequence=True, recompute="full"),
    "full": Case(recompute="full"),
    "full, 2 layers": Case(recompute="full", layers=2),
    "fp32 selective": Case(dtype="float32", recompute="selective"),
    "tp2 selective": Case(tensor=2, recompute="selective", algorithm="bicc"),
    "tp2 sp full": Case(tensor=2, sequence=True, recompute="full"),
    "cp2": Case(context=2),
    "cp2, 2 layers": Case(context=2, layers=2),
    "cp2 bicc full": Case(context=2, recompute="full", algorithm="bicc"),
    "kernels cp2 tp2 sp": Case(kernels=True, context=2, tensor=2, sequence=True, algorithm="gspo+bicc"),
    "pp2 first": Case(stage=0, algorithm="bicc"),
    "pp2 tp2 sp last": Case(stage=1, tensor=2, sequence=True, algorithm="bicc"),
    "moe": Case(model="qwen3_moe"),
    "moe tp2 sp full": Case(model="qwen3_moe", tensor=2, sequence=True, recompute="full", replay="engine"),
    "moe fp32 pp2 last": Case(model="qwen3_moe", dtype="float32", stage=1, algorithm="bicc", replay="old"),
    "te": Case(backend=TE),
    "te, 2 layers": Case(backend=TE, layers=2),
    "te bicc": Case(backend=TE, algorithm="bicc"),
    "te tp2 selective": Case(backend=TE, tensor=2, recompute="selective"),
    "te fp32 tp2 sp full": Case(backend=TE, dtype="float32", tensor=2, sequence=True, recompute="full"),
    "te kernels bicc": Case(backend=TE, kernels=True, algorithm="bicc"),
    "te pp2 last": Case(backend=TE, stage=1, algorithm="bicc"),
    "te moe": Case(backend=TE, model="qwen3_moe"),
    "te moe tp2 sp pp2 full": Case(
        backend=TE, model="qwen3_moe", tensor=2, sequence=True, stage=0, recompute="full", algorithm="bicc"
    ),
}
"""Every layout, type, recomputation, model and backend, and most pairs of them"""
