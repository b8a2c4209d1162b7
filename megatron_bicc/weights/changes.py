"""Finds the elements of the weights that changed since the last sync and writes them to a file.

At a small learning rate a step changes few elements of 16-bit weights: most updates are lost in rounding, and
only the fp32 copy of the optimizer has them. Servers apply the file by sglang/in_server/bicc_weights.py.

A file is a safetensors file. A tensor NAME that changed has

    NAME:positions  int32 [n], in the flattened tensor, ascending
    NAME:values     [n], of the tensor's dtype
    NAME:shape      int64 [dimensions]

or is in it whole, as NAME, where that takes fewer bytes.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

POSITION_BYTES = 4


class LastWeights:
    """A host copy of the weights that were sent last."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def changes(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the content of a file of changes, and keeps the tensors.

        tensors: contiguous, in host memory; one without an earlier version is returned whole.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in tensors:
            last = self._tensors.get(name)
            if last is None:
                self._tensors[name] = found[name] = tensor.clone()
                continue
            new, old = tensor.view(-1), last.view(-1)
            # as integers: the bits count, so that -0 is not 0
            bits = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
            positions = (new.view(bits) != old.view(bits)).nonzero().view(-1)
            if not len(positions):
                continue
            if len(positions) * (POSITION_BYTES + tensor.itemsize) < tensor.nbytes and tensor.numel() < 2**31:
                values = new[positions]
                old[positions] = values
                found[f"{name}:positions"] = positions.int()
                found[f"{name}:values"] = values
                found[f"{name}:shape"] = torch.tensor(tensor.shape)
            else:
                found[name] = last.copy_(tensor)
        return found


def write_changes(path: Path, changes: dict[str, Tensor]) -> int:
    """Writes a file of changes; returns its size in bytes. Raises OSError."""
    save_file(changes, path)
    return path.stat().st_size
