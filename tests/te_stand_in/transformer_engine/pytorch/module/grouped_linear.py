"""The linear layers of several experts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .base import TransformerEngineBaseModule


class GroupedLinear(TransformerEngineBaseModule):
    """Expert i multiplies its rows by weight{i} [out_features, in_features]."""

    def __init__(
        self,
        num_gemms: int,
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
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        """fuse_wgrad_accumulation is ignored: the gradient reaches `main_grad` by megatron-core's hook."""
        super().__init__()
        init = (init_method, get_rng_state_tracker, rng_tracker_name)
        self._set_up(tp_group, tp_size, parallel_mode, sequence_parallel, init)
        if bias or self.tp_size > 1:
            raise NotImplementedError("the stand-in for GroupedLinear has no bias and no tensor parallel")
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.use_bias, self.save_original_input = bias, save_original_input
        for i in range(num_gemms):
            self._add_weight(f"weight{i}", (out_features, in_features), device=device, dtype=params_dtype)

    def forward(
        self,
        inp: Tensor,
        m_splits: list[int] | Tensor,
        is_first_microbatch: bool | None = None,
        out: Tensor | None = None,
        dgrad_out: Tensor | None = None,
    ) -> Tensor:
        """Returns the products; m_splits: rows of each expert, one expert after another."""
        sizes = m_splits.tolist() if isinstance(m_splits, Tensor) else m_splits
        parts = inp.split(sizes)
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])
