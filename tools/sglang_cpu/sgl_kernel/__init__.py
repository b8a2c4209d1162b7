"""Stub of sgl_kernel, which is published for CUDA only, so that SGLang can be imported on a CPU.

Every name that SGLang imports exists; each call raises. A dense or mixture-of-experts language model with
the torch attention and sampling backends makes no such call.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0+cpu.stand.in"
__path__: list[str] = []


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Returns a function that raises NotImplementedError."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel, and this SGLang runs on a CPU")

    return refuse
