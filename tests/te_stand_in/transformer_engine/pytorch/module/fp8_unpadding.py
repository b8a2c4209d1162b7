"""The inverse of Fp8Padding."""

import torch


class Fp8Unpadding(torch.nn.Module):
    """Removes the padding; not in this stand-in."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
