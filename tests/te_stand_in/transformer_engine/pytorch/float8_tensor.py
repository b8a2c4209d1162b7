"""The former place of Float8Tensor."""

from .tensor import Float8Tensor

__all__ = ["Float8Tensor"]
