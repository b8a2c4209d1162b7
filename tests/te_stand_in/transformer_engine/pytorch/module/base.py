"""What the linears share: parameters, the extra state in checkpoints, and collectives of tensor parallel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _ExtraState(torch.nn.Module):
    """A module whose state dict has an extra state. It is empty, as Transformer Engine's without fp8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass


class TransformerEngineBaseModule(_ExtraState):
    """A linear that is cut over the tensor-parallel group."""

    fp8 = fp8_calibration = False

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Does nothing: there is no state of quantised products."""

    def _set_up(
        self,
        tp_group: dist.ProcessGroup | None,
        tp_size: int,
        parallel_mode: str | None,
        sequence_parallel: bool,
        init: tuple[Callable[[Tensor], Any] | None, Callable[[], Any] | None, str | None],
    ) -> None:
        """init: the method that fills weights in, the random-number tracker and the name of its state."""
        self.fp8_meta = {"fp8_checkpoint": False}  # megatron-core reads it in checkpoints of experts
        if parallel_mode not in (None, "column", "row"):
            raise ValueError(f"parallel_mode {parallel_mode} not supported")
        self.tp_group, self.parallel_mode, self._init = tp_group, parallel_mode, init
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

    def _add_weight(self, name: str, shape: tuple[int, int], **kwargs: Any) -> None:
        """Adds a weight [out, in]: filled in and marked for megatron-core, unless it is on the meta device.

        kwargs: device, dtype.
        """
        weight = torch.nn.Parameter(torch.empty(shape, **kwargs))
        self.register_parameter(name, weight)
        if weight.device.type != "meta":
            method, tracker, state = self._init
            if tracker is None:
                method(weight)
            else:
                with tracker().fork(state) if state else tracker().fork():
                    method(weight)
            _mark(weight, 1 if self.parallel_mode == "row" else 0)

    def _add_bias(self, size: int, **kwargs: Any) -> None:
        """Adds a bias of zeros; kwargs as above."""
        self.bias = torch.nn.Parameter(torch.zeros(size, **kwargs))
        if self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            _mark(self.bias, 0)

    def _enter(self, rows: Tensor) -> Tensor:
        """Returns the rows that this rank multiplies, of the rows that it has."""
        if self.parallel_mode != "column" or self.tp_size == 1:
            return rows
        return (_Gather if self.sequence_parallel else _Copy).apply(rows, self.tp_group)

    def _leave(self, rows: Tensor) -> Tensor:
        """Returns the sum over the group of the products of rows, or this rank's part of its rows."""
        if self.parallel_mode != "row" or self.tp_size == 1:
            return rows
        return (_Scatter if self.sequence_parallel else _Sum).apply(rows, self.tp_group)


def _mark(parameter: Tensor, axis: int) -> None:
    """Sets what megatron-core reads of a parameter that tensor parallel cuts along `axis`."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = axis
    parameter.partition_stride = 1


def _summed(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = rows.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(rows, group=group)
    return rows


def _gathered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out


def _scattered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(out, rows.contiguous(), group=group)
    return out


class _Collective(torch.autograd.Function):
    """A collective over rows and, for the gradient, its adjoint."""

    @classmethod
    def forward(cls, ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return cls.collect(rows, group)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return cls.adjoint(grad, ctx.group), None


class _Copy(_Collective):
    """Every rank has all rows; each multiplies by its own weights."""

    adjoint = staticmethod(_summed)

    @staticmethod
    def collect(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        return rows.view_as(rows)


class _Sum(_Collective):
    """Sums the ranks' parts of all rows."""

    collect = staticmethod(_summed)

    @staticmethod
    def adjoint(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
        return grad


class _Gather(_Collective):
    """Gathers the ranks' rows."""

    collect = staticmethod(_gathered)
    adjoint = staticmethod(_scattered)


class _Scatter(_Collective):
    """Sums the ranks' parts; each rank gets the sums of its own rows."""

    collect = staticmethod(_scattered)
    adjoint = staticmethod(_gathered)
