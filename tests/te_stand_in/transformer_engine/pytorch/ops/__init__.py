"""Fusible operations: the names that megatron-core's annotations read when it is imported."""

import torch


class FusibleOperation(torch.nn.Module):
    """Not in this stand-in."""


class Sequential(torch.nn.Module):
    """Not in this stand-in."""
