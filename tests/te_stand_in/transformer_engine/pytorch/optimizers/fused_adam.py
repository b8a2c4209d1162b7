"""Adam with the state of Transformer Engine's: the step count is in the parameter group."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam with L2 regularisation) in fp32, of fp32 parameters.

    State of a parameter, made in its first step: exp_avg and exp_avg_sq, as the parameter.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter | dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        moments = {exp_avg_dtype, exp_avg_sq_dtype}
        if amsgrad or capturable or master_weights or use_decoupled_grad or moments != {torch.float32}:
            raise NotImplementedError("the stand-in for FusedAdam has fp32 moments of fp32 parameters only")
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )
        self.adam_w_mode = 1 if adam_w_mode else 0

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        """Makes the zero moments of a parameter."""
        self.state[param] = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scaler: object = None) -> Tensor | None:
        """Takes one step. Parameters without a gradient keep their value."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1  # also of a group that is empty on this rank
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, False)
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict) -> None:
        if not isinstance(group["step"], int):
            raise TypeError(f"multi_tensor_adam takes a step of type int, not {group['step']!r}")
        grad, (beta1, beta2) = param.grad, group["betas"]
        if not self.adam_w_mode:
            grad = grad + group["weight_decay"] * param
        mean, square = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected = group["bias_correction"]
        mean_scale = 1 - beta1 ** group["step"] if corrected else 1.0
        square_scale = 1 - beta2 ** group["step"] if corrected else 1.0
        update = (mean / mean_scale) / ((square / square_scale).sqrt() + group["eps"])
        if self.adam_w_mode:
            update += group["weight_decay"] * param
        param.sub_(update, alpha=group["lr"])
