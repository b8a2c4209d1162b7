"""megatron-core imports this name with FusedAdam; this package optimises with Adam."""

import torch


class FusedSGD(torch.optim.Optimizer):
    """Not in this stand-in."""
