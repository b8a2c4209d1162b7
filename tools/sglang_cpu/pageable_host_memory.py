"""Lets SGLang return its routing with a CPU build of torch; run at start-up from a .pth file.

SGLang keeps the experts of all tokens in host memory that it registers with CUDA, and so fails to start with
--enable-return-routed-experts where there is no CUDA. This module makes it take plain memory there, right
after the module that allocates has been imported.
"""

import importlib.abc
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "sglang.srt.mem_cache.pool_host.common"


class AfterHostPools(importlib.abc.MetaPathFinder):
    """Finds the module once, with a loader that changes it, then removes itself."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            import torch  # late: this module is loaded by every start of this environment's Python

            if torch.version.cuda is None:
                module.ALLOC_MEMORY_FUNCS["cpu"] = allocate

        spec.loader.exec_module = load_and_change
        return spec


def allocate(dims: tuple[int, ...], dtype: Any, device: str, allocator: Any, **_: Any) -> Any:
    """Stands in for alloc_with_host_register, without registering the memory."""
    return allocator.allocate(dims, dtype=dtype, device=device)


sys.meta_path.insert(0, AfterHostPools())
