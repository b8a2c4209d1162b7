"""The modules, at the places where megatron-core looks for them."""

from . import (
    cpu_offload,
    cpu_offload_v1,
    distributed,
    float8_tensor,
    fp8,
    ops,
    optimizers,
    router,
    tensor,
)
from .attention import DotProductAttention
from .module import (
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "cpu_offload",
    "cpu_offload_v1",
    "distributed",
    "float8_tensor",
    "fp8",
    "ops",
    "optimizers",
    "router",
    "tensor",
]
