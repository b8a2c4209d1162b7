"""Makes torchvision importable with a CPU build of torch; run at start-up from a .pth file.

torchvision's usual wheel is linked against CUDA, so with a CPU torch its compiled part does not load, and the
import fails, because the operators that it would have defined are unknown. SGLang imports torchvision for
image models. This module declares the two operators, without an implementation, just before that import.
"""

import importlib.abc
import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first imported, then removes itself; finds no module."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch  # late: this module is loaded by every start of this environment's Python

            fits = torch.version.cuda or "+cpu" in importlib.metadata.version("torchvision")
            for operator in () if fits else OPERATORS:
                torch.library.define(f"torchvision::{operator}", SCHEMA)
        return None


sys.meta_path.insert(0, BeforeTorchvision())
