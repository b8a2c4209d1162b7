"""Redirects CUDA calls so that megatron-core 0.16 runs on a CPU over gloo.

Megatron-core names CUDA in factory calls (`device="cuda"`), in `torch.cuda` streams and random states, and
in tensor type names. `CudaOnCpu` redirects these to the CPU while it is active; outside it torch is
unchanged. tests/driver/test_device.py names the attribute that a new megatron-core has moved. A dry run
redirects to the meta device instead.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import megatron.core.tensor_parallel.random as megatron_random
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode

_ALL_TO_ALL = dist.all_to_all_single
if not hasattr(moe_utils, "te_general_gemm"):
    # megatron-core 0.16 reads this name, but defines it only where Transformer Engine is installed
    moe_utils.te_general_gemm = None


class _CpuStream:
    """A stream or event of a device whose operations are finished when they return."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_CpuStream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> "_CpuStream":
        return self

    def query(self) -> bool:
        return True

    def _done(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _done


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _all_to_all(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Passes the split sizes as lists: gloo refuses the NumPy arrays that the token dispatcher passes."""
    sizes = [None if x is None else [int(n) for n in x] for x in (output_split_sizes, input_split_sizes)]
    return _ALL_TO_ALL(output, input, *sizes, **kwargs)


def _seams(device: str = "cpu") -> list[tuple[ModuleType, str, Any]]:
    """Returns (module, attribute, its replacement on `device`) for every redirected CUDA name."""
    return [
        (torch.cuda, "current_device", lambda: device),
        (torch.cuda, "current_stream", _CpuStream),
        (torch.cuda, "Stream", _CpuStream),
        (torch.cuda, "Event", _CpuStream),
        (torch.cuda, "stream", _CpuStream),
        (torch.cuda, "synchronize", lambda *args: None),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (dist, "all_to_all_single", _all_to_all),
        (megatron_random, "_get_cuda_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
    ]


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


class CudaOnCpu(TorchFunctionMode):
    """Context in which requests for CUDA go to the CPU; may be nested."""

    def __init__(self, device: Literal["cpu", "meta"] = "cpu") -> None:
        """device: replaces CUDA in every request."""
        super().__init__()
        self.device = device

    def __enter__(self) -> "CudaOnCpu":
        self._saved = [(module, name, getattr(module, name)) for module, name, _ in _seams()]
        for module, name, stand_in in _seams(self.device):
            setattr(module, name, stand_in)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for module, name, original in self._saved:
            setattr(module, name, original)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": self.device}
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs.get("pin_memory"):  # a host without a GPU has none
            kwargs = kwargs | {"pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], self.device, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the distributed optimizer sorts parameters by the name 'torch.cuda.FloatTensor'
            return f"torch.cuda.{func(*args).rpartition('.')[2]}"
        return func(*args, **kwargs)
