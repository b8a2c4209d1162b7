"""Packs a step with rows that csrc's kernel writes in device memory; `pack` does it on the host.

Shape suffixes: N rows of a micro-batch, A its response rows, T response tokens of the step, R its rollouts.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.packing.pack import make_plan
from megatron_bicc.packing.types import PackingSettings, RolloutBatch, StepPlan


@dataclass(frozen=True)
class DeviceRollouts:
    """The tokens of a step in device memory: copied there once, for all layouts."""

    prompt_tokens: Tensor
    """int32 [sum of prompt lengths]"""
    tokens: Tensor
    """int32 [T]"""

    @classmethod
    def upload(cls, batch: RolloutBatch, to: torch.device) -> "DeviceRollouts":
        """Copies the tokens of a batch to a device."""
        return cls(*device.upload([batch.prompt_tokens, batch.tokens], to))


@dataclass(frozen=True)
class DeviceRows:
    """The rows of a micro-batch on the device, as the policy reads them."""

    tokens_N: Tensor
    """int64 [N]"""
    positions_N: Tensor
    """int64 [N]"""
    labels_A: Tensor
    """int64 [A]: the token that each response row predicts"""
    token_A: Tensor
    """int64 [A]: index of the label among the T response tokens"""
    response_A: Tensor
    """int64 [A]: response segment (0..S-1) of each response row"""
    rollout_A: Tensor
    """int64 [A]: index of the rollout among the R"""
    scale_A: Tensor
    """float32 [A]: 1 / number of segments in the whole step that train this rollout"""


def pack_on_device(
    batch: RolloutBatch,
    rollouts: DeviceRollouts,
    settings: PackingSettings,
    dp_size: int,
    rank: int,
    context_rank: int = 0,
) -> tuple[StepPlan, list[DeviceRows]]:
    """Plans a step as `pack` does and fills the rows of one context rank on the device.

    The plan's copies go there in one transfer, one kernel fills the rows of all micro-batches; the result
    holds views of its arrays. The host does not wait for either.

    Args:
        batch: the scored groups, on the host.
        rollouts: the tokens of `batch`, on the device of the result.
        settings, dp_size, rank, context_rank: as for `pack`.

    Raises:
        ValueError: as `pack` does.
    """
    native, plan = make_plan(batch, settings, dp_size)
    copies, headers = device.upload(
        [native.copies(rank, context_rank), native.headers], rollouts.tokens.device
    )
    rows_M, response_M = native.rows(rank, context_rank).T.tolist()
    filled = fill_rows(copies, headers, rollouts.prompt_tokens, rollouts.tokens, sum(rows_M), sum(response_M))
    # the first two arrays are of all rows, the others of response rows
    views = [array.split(rows_M if i < 2 else response_M) for i, array in enumerate(filled)]
    return plan, [DeviceRows(*arrays) for arrays in zip(*views, strict=True)]


@torch.library.custom_op("megatron_bicc::fill_rows", mutates_args=())
def fill_rows(
    copies: Tensor, headers: Tensor, prompt_tokens: Tensor, tokens: Tensor, rows: int, response_rows: int
) -> list[Tensor]:
    """Returns the fields of DeviceRows, each of all micro-batches of a rank, one after another.

    copies: int64 [copies, 13], _C.Plan.copies of the context rank. headers: int32, _C.Plan.headers.
    prompt_tokens, tokens: int32, DeviceRollouts. rows, response_rows: of all micro-batches.
    """
    found = _empty_rows(tokens.device, rows, response_rows)
    names = ("tokens", "positions", "labels", "gather", "segments", "rollouts", "scales")
    device.kernels().fill(
        copies=copies.data_ptr(),
        count=len(copies),
        prompt_tokens=prompt_tokens.data_ptr(),
        response_tokens=tokens.data_ptr(),
        headers=headers.data_ptr(),
        stream=device.stream(tokens),
        **{name: array.data_ptr() for name, array in zip(names, found, strict=True)},
    )
    return found


@fill_rows.register_fake
def _(
    copies: Tensor, headers: Tensor, prompt_tokens: Tensor, tokens: Tensor, rows: int, response_rows: int
) -> list[Tensor]:
    return _empty_rows(tokens.device, rows, response_rows)


def _empty_rows(where: torch.device, rows: int, response_rows: int) -> list[Tensor]:
    """Returns an uninitialised array for each field of DeviceRows."""
    return [
        torch.empty(
            rows if field.name.endswith("_N") else response_rows,
            dtype=torch.float32 if field.name == "scale_A" else torch.int64,
            device=where,
        )
        for field in fields(DeviceRows)
    ]
