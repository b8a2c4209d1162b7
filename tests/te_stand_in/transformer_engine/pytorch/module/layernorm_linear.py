"""A norm and the linear layer after it, in one module."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .base import TransformerEngineBaseModule


class LayerNormLinear(TransformerEngineBaseModule):
    """RMSNorm of this rank's rows, then the product of all rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: tuple[str, ...] | dict[str, int] | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        """fuse_wgrad_accumulation is ignored: the gradient reaches `main_grad` by megatron-core's hook."""
        super().__init__()
        if normalization != "RMSNorm" or parallel_mode == "row":
            raise NotImplementedError("the stand-in for LayerNormLinear has RMSNorm and columns only")
        init = (init_method, get_rng_state_tracker, None)
        self._set_up(tp_group, tp_size, parallel_mode, sequence_parallel, init)
        self.eps, self.in_features, self.zero_centered_gamma = eps, in_features, zero_centered_gamma
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias = bias, return_bias
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, device=device, dtype=params_dtype)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self._add_weight("weight", (self.out_features, in_features), device=device, dtype=params_dtype)
        if bias:
            self._add_bias(self.out_features, device=device, dtype=params_dtype)

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the product, with the bias that is still to be added if `return_bias`."""
        weight = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
        normed = F.rms_norm(inp, (self.in_features,), weight, self.eps)
        product = F.linear(self._enter(normed), self.weight)
        if not self.use_bias:
            return product
        return (product, self.bias) if self.return_bias else product + self.bias
