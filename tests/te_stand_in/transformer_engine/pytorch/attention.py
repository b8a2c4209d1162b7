"""megatron-core derives a class from this name when it is imported; attention is megatron_bicc's own."""

import torch


class DotProductAttention(torch.nn.Module):
    """Not in this stand-in."""
