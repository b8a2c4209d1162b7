"""Linear layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .base import TransformerEngineBaseModule


class Linear(TransformerEngineBaseModule):
    """Product with a weight [out_features, in_features], of which a rank has the rows or the columns."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: tuple[str, ...] | dict[str, int] | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        """fuse_wgrad_accumulation is ignored: the gradient reaches `main_grad` by megatron-core's hook."""
        super().__init__()
        init = (init_method, get_rng_state_tracker, rng_tracker_name)
        self._set_up(tp_group, tp_size, parallel_mode, sequence_parallel, init)
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input
        self._add_weight("weight", (self.out_features, self.in_features), device=device, dtype=params_dtype)
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
        product = self._leave(F.linear(self._enter(inp), self.weight))
        if not self.use_bias:
            return product
        return (product, self.bias) if self.return_bias else product + self.bias
