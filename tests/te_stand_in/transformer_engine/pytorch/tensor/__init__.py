"""Quantised tensors: types of which there is no instance."""


class QuantizedTensor:
    """Base of all quantised tensors."""


class Float8Tensor(QuantizedTensor):
    """Tensor of 8-bit floats with one scale."""
