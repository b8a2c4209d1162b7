"""Loads changed elements of weights into the model of an SGLang server; runs inside the server.

Servers that a run starts have this directory on their PYTHONPATH and --custom-weight-loader
bicc_weights.apply_changes. weights/changes.py writes the file. Imports nothing of megatron_bicc, which is not
installed in the server's environment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open


def apply_changes(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Overwrites the elements that a file names. named_tensors: the file's path as the only name.

    The model's own load_weights fuses and cuts the tensors. It gets tensors that are NaN where nothing
    changed, and those elements are not copied. Weights are never NaN: the trainer refuses to send such ones.
    """
    ((path, _),) = named_tensors
    with safe_open(path, "pt") as file, _copying_numbers_only(model):
        model.load_weights(_tensors(file))


def _tensors(file: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for key in sorted(file.keys()):
        name, _, part = key.partition(":")
        if part == "values":
            values, shape = file.get_tensor(f"{name}:values"), file.get_tensor(f"{name}:shape")
            whole = torch.full((int(shape.prod()),), torch.nan, dtype=values.dtype)
            whole[file.get_tensor(f"{name}:positions").long()] = values
            yield name, whole.view(shape.tolist())
        elif not part:
            yield name, file.get_tensor(name)


@contextmanager
def _copying_numbers_only(model: torch.nn.Module) -> Iterator[None]:
    """Makes copies into the model's parameters leave out NaN, in all threads: some models load in several."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    original = torch.Tensor.copy_

    def copy_(target: torch.Tensor, source: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if target.untyped_storage().data_ptr() in parameters:
            source = source.to(target.device, target.dtype)
            source = torch.where(source.isnan(), target, source)
        return original(target, source, *arguments, **options)

    torch.Tensor.copy_ = copy_
    try:
        yield
    finally:
        torch.Tensor.copy_ = original
