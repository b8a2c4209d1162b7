"""Counts what a step on fake CUDA tensors would make a GPU and its host do, by phase of the step."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPOSITORY = Path(__file__).parents[2]
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh")
WITHOUT_KERNEL = (*ALLOCATIONS, "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "set_")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
"""The host must read the size of their result"""


class Watch(TorchDispatchMode):
    """Counters by phase; `record` makes them JSON."""

    def __init__(self, experts_per_row: int) -> None:
        """experts_per_row: how many experts a router chooses; 0 without experts."""
        super().__init__()
        self.experts_per_row, self.chosen_rows = experts_per_row, 0
        self.phase = "build"
        self.calls: Counter[str] = Counter()
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)
        """Operations on CUDA tensors that are kernels, by name; collectives are not among them"""
        self.collectives: dict[str, Counter[str]] = defaultdict(Counter)
        self.syncs: dict[str, Counter[str]] = defaultdict(Counter)
        """Places at which the host waits for the device to read from it"""
        self.copies: dict[str, Counter[str]] = defaultdict(Counter)
        """Places that copy from the host to the device"""
        self.products: dict[str, Counter[str]] = defaultdict(Counter)
        """Matrix products with a factor that is not bf16: "place: type x type" """

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts under `phase` in the block."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def synchronize(self, *args: Any) -> None:
        """torch.cuda.synchronize"""
        self.synced(f"{place()}: synchronize")

    def synced(self, where: str) -> None:
        """Counts a place at which the host waits."""
        self.syncs[self.phase][where] += 1

    def listed(self, values: Tensor) -> list[float]:
        """Tensor.tolist: whole numbers are the rows of each expert, evenly all that were chosen last."""
        if values.is_cuda:
            self.synced(place())
        if values.dtype.is_floating_point:
            return [0.5] * len(values)
        whole, rest = divmod(self.chosen_rows, len(values))
        return [whole + (i < rest) for i in range(len(values))]

    def record(self) -> dict[str, dict[str, dict[str, int]]]:
        """Returns {kind: {phase: {what: count}}}."""
        kinds = ("launches", "collectives", "syncs", "copies", "products")
        counters = {kind: {phase: dict(c) for phase, c in getattr(self, kind).items()} for kind in kinds}
        return {"calls": dict(self.calls)} | counters

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            if args[0].is_cuda:
                self.syncs[self.phase][place()] += 1
            # a finite number, true, or a count: what the step reads when nothing is wrong
            return {True: 0.5, False: 1}[args[0].dtype.is_floating_point]
        on_cuda = any(x.is_cuda for x in tensors)
        if on_cuda and (name in OF_UNKNOWN_SIZE or _has_mask(name, args)):
            self.syncs[self.phase][f"{place()}: {name}"] += 1
        if on_cuda and name.startswith(("index", "_index", "_unsafe_index")):
            for index in tree_leaves(args[1]):
                if isinstance(index, Tensor) and not index.is_cuda:
                    self.copies[self.phase][f"{place()}: index on the host"] += 1
        if name == "masked_select":
            # megatron-core's routing: each of a micro-batch's rows chooses the same number of experts
            self.chosen_rows = args[1].shape[-1] * self.experts_per_row
            return args[0].new_empty(self.chosen_rows)
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._count(func, name, tensors, outputs)
        return out

    def _count(self, func: Any, name: str, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        if name in ("_to_copy", "copy_"):
            source, target = tensors[-1].device.type, outputs[0].device.type
            if (source, target) == ("cuda", "cpu"):
                self.syncs[self.phase][f"{place()}: copy to the host"] += 1
                return
            if (source, target) == ("cpu", "cuda"):
                self.copies[self.phase][place()] += 1
                return
        if not any(x.is_cuda for x in (*tensors, *outputs)):
            return
        if func.namespace == "c10d":
            self.collectives[self.phase][name] += 1
        elif func.namespace != "prim" and not func.is_view and name not in WITHOUT_KERNEL:
            self.launches[self.phase][name] += 1
        # what a product is added to comes first, and may be wider
        added = 1 if name.rstrip("_") in ("addmm", "baddbmm") else 0
        factors = [str(x.dtype).removeprefix("torch.") for x in tensors[added : added + 2]]
        if name.rstrip("_") in PRODUCTS and set(factors) != {"bfloat16"}:
            self.products[self.phase][f"{place()}: {' x '.join(factors)}"] += 1


def _has_mask(name: str, args: tuple) -> bool:
    """Returns whether an indexing operation gets a mask whose true elements the host must count.

    It need not where it writes one number from the host: that is a masked fill.
    """
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    masks = [
        x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
    ]
    is_fill = name != "index" and args[2].numel() == 1 and not args[2].is_cuda
    return bool(masks) and not is_fill


def place() -> str:
    """Returns the innermost caller in the package or in megatron-core, as "path/file.py:function"."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        for package in ("megatron_bicc/", "megatron/core/"):
            if f"/{package}" in path and not path.endswith("device_cpu.py"):
                return f"{package}{path.rpartition(f'/{package}')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
