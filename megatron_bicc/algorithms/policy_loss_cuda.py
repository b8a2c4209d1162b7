"""The policy loss of the built-in objectives in csrc's kernel: value, gradient and clip masks at once.

algorithms.policy_loss calls it where device.kernels() computes, and defines what it computes.

Shape suffixes: A response rows of the micro-batch.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_bicc import device


@torch.library.custom_op("megatron_bicc::policy_loss", mutates_args=())
def policy_loss_kernel(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    response: Tensor,
    regularisation: Tensor | None,
    ref_logp: Tensor | None,
    mean: Tensor | None,
    objective: str,
    low: float,
    high: float,
    dual: float,
    kl_coefficient: float,
    kl_estimator: str,
    entropy_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (the loss, its gradients with respect to logp and mean, [A] each, masks bool [3, A]).

    Differentiable in logp, entropy and mean. The masks are low, high, dual. The tensors are those of
    policy_loss.policy_loss and LossRows, all of logp's dtype, float32 or float64, but `response`, int64. low,
    high, dual: ClipBounds. A coefficient of 0 leaves its term out, so that its tensors may be None. mean: at
    each row, what an objective of whole responses averages (policy_loss.AVERAGED), where other ranks have
    rows of the same responses; None: the kernel averages, and there is no gradient of it, [0].

    Raises:
        ValueError: a tensor has another dtype than logp.
    """
    share, gradient, mean_gradient, masks = _empty_loss(logp, mean)
    partials = torch.empty(device.kernels().LOSS_BLOCKS, dtype=torch.float64, device=logp.device)
    inputs = {
        "logp": logp,
        "old_logp": old_logp,
        "advantage": advantage,
        "weight": weight,
        "regularisation": regularisation,
        "ref_logp": ref_logp,
        "entropy": entropy,
        "mean": mean,
    }
    for name, tensor in inputs.items():
        if tensor is not None and tensor.dtype != logp.dtype:
            raise ValueError(f"LossRows.{name} has dtype {tensor.dtype}, but the log-probs have {logp.dtype}")
    # held until the launch: a copy that is not kept would be freed and its memory used again before it
    read = {name: None if tensor is None else tensor.contiguous() for name, tensor in inputs.items()}
    response = response.contiguous()
    launch = getattr(device.kernels(), f"policy_loss_{device.dtype_name(logp.dtype)}")
    launch(
        objective=objective,
        low=low,
        high=high,
        dual=dual,
        kl_coefficient=kl_coefficient,
        kl_estimator=kl_estimator,
        entropy_coefficient=entropy_coefficient,
        rows=len(logp),
        response=response.data_ptr(),
        share=share.data_ptr(),
        gradient=gradient.data_ptr(),
        mean_gradient=mean_gradient.data_ptr(),
        masks=masks.data_ptr(),
        partials=partials.data_ptr(),
        stream=device.stream(logp),
        **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in read.items()},
    )
    return share, gradient, mean_gradient, masks


def _empty_loss(logp: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = len(logp)
    masks = torch.empty(3, rows, dtype=torch.bool, device=logp.device)
    return logp.new_empty(()), logp.new_empty(rows), logp.new_empty(0 if mean is None else rows), masks


@policy_loss_kernel.register_fake
def _(logp: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_loss(logp, others[7])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2], inputs[6])
    ctx.entropy_coefficient = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_share: Tensor, *others: Any) -> tuple:
    gradient, mean_gradient, regularisation = ctx.saved_tensors
    of_entropy, of_mean = None, None
    if ctx.entropy_coefficient and ctx.needs_input_grad[1]:
        of_entropy = regularisation * (-ctx.entropy_coefficient * grad_share)
    if ctx.needs_input_grad[8]:
        of_mean = mean_gradient * grad_share
    return gradient * grad_share, of_entropy, *[None] * 6, of_mean, *[None] * 7


policy_loss_kernel.register_autograd(_backward, setup_context=_setup_context)
