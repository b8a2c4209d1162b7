"""Stand-in for sgl_kernel, which is published for CUDA only: SGLang can be imported on a CPU, nothing more.

Every name that SGLang imports is there; each call raises. A dense or mixture-of-experts language model under
the torch attention and sampling back ends makes no such call.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0+cpu.stand.in"
__path__: list[str] = []


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A function that refuses to run, whatever the name."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel, and this SGLang runs on a CPU")

    return refuse
