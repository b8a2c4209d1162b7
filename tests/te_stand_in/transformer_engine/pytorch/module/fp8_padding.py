"""Experts' layers of megatron-core make one in every case, and call it for quantised layers only."""

import torch


class Fp8Padding(torch.nn.Module):
    """Pads the rows of each expert to a multiple that quantised products need; not in this stand-in."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
