"""csrc's kernels over a chunk of logits (csrc/cuda/log_probs.h) as torch operators, a pass each way.

z stands for logits / temperature. Shape suffixes: L rows of the chunk, V tokens of this rank's part of the
vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_bicc import device


@torch.library.custom_op("megatron_bicc::logit_statistics", mutates_args=())
def logit_statistics(logits: Tensor, labels: Tensor, first: int, temperature: float) -> Tensor:
    """Returns float32 [4, L] over this rank's part of the vocabulary.

    They are the largest z, sum exp(z - largest), sum exp(z - largest) (z - largest), and the label's z, or 0
    if the label is in another rank's part.

    logits: float32 [L, V]. labels: int64 [L], token ids. first: token id of column 0.

    Raises ValueError if a type, shape or stride does not fit.
    """
    statistics = logits.new_empty(4, len(logits))
    device.kernels().logit_statistics(
        _rows(logits, labels, first, temperature),
        statistics=statistics.data_ptr(),
        stream=device.stream(logits),
    )
    return statistics


@logit_statistics.register_fake
def _(logits: Tensor, labels: Tensor, first: int, temperature: float) -> Tensor:
    return logits.new_empty(4, logits.shape[0])


def logit_gradient(
    logits_LV: Tensor,
    labels_L: Tensor,
    first: int,
    temperature: float,
    lse_L: Tensor,
    entropy_L: Tensor,
    grad_log_prob_L: Tensor,
    grad_entropy_L: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient of the logits, [L, V] of `dtype`, in the memory of `logits_LV`.

    Rows of 16-bit gradients keep the distance of the float32 rows.

    logits_LV, labels_L, first: as for `logit_statistics`. lse_L, entropy_L: float32, of z over the whole
    vocabulary. grad_log_prob_L, grad_entropy_L: float32; without the latter the entropy is in no loss.
    dtype: float32, float16 or bfloat16.
    """
    overwrite_with_gradient(
        logits_LV, labels_L, first, temperature, lse_L, entropy_L, grad_log_prob_L, grad_entropy_L, dtype
    )
    return logits_LV.view(dtype)[:, : logits_LV.shape[1]]


@torch.library.custom_op("megatron_bicc::overwrite_with_gradient", mutates_args=("logits",))
def overwrite_with_gradient(
    logits: Tensor,
    labels: Tensor,
    first: int,
    temperature: float,
    lse: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Writes the gradient of each row's logits as elements of `dtype` from the row's first byte on.

    Arguments as for `logit_gradient`. Raises ValueError if a type, shape or stride does not fit.
    """
    of_rows = {"lse": lse, "entropy": entropy, "grad_log_prob": grad_log_prob}
    if grad_entropy is not None:
        of_rows["grad_entropy"] = grad_entropy
    for name, values in of_rows.items():
        if values.dtype != torch.float32 or values.shape != labels.shape:
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}; it must be float32, one a row")
    # kept here while the kernel is queued: a copy that `contiguous` made must not be freed before
    dense = {name: values.contiguous() for name, values in of_rows.items()}
    pointers = {name: values.data_ptr() for name, values in dense.items()}
    device.kernels().logit_gradient(
        device.dtype_name(dtype),
        _rows(logits, labels, first, temperature),
        **({"grad_entropy": 0} | pointers),
        stream=device.stream(logits),
    )


@overwrite_with_gradient.register_fake
def _(*arguments: Any) -> None: ...


def _rows(logits: Tensor, labels: Tensor, first: int, temperature: float) -> Any:
    """Returns csrc's LogitRows. Raises ValueError if a type, shape or stride does not fit."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"logits are {logits.dtype} {list(logits.shape)} with strides {logits.stride()}; they must be "
            "float32 [rows, vocabulary] with contiguous rows"
        )
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1] or not labels.is_contiguous():
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; they must be int64, one a row")
    return device.kernels().LogitRows(
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        first=first,
        labels=labels.data_ptr(),
        scale=1.0 / temperature,
    )
