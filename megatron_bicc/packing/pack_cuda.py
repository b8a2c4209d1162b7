"""The packer's fill on a GPU: planned on the host, one launch on the current stream. Needs the CUDA build.

The trainer does not call it yet; tests/gpu compares it with the CPU packer.

Shape suffixes: F features, T response tokens of the step, N rows, A response rows.
"""

import numpy as np
import torch

from megatron_bicc import _C, _C_cuda
from megatron_bicc.packing.types import PackingSettings, RolloutBatch


def fill_on_device(
    batch: RolloutBatch,
    settings: PackingSettings,
    dp_size: int,
    device: torch.device,
    features_FT: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Packs a step into GPU memory; copies and launch are queued on the device's current stream.

    Args:
        batch: the scored groups, on the host.
        settings: layout, contexts and budgets.
        dp_size: number of data-parallel ranks.
        device: device of the result.
        features_FT: float32 [F, T] on `device`, gathered like the labels.

    Returns:
        "tokens_N", "positions_N", "labels_N" (int32), "gather_A" (int64) and "features_FA" (float32): flat
        arrays with the micro-batches of all ranks, as packing.pack makes them, rank by rank.

    Raises:
        ValueError: as `pack` does, and for features of another shape, dtype or device.
    """
    if features_FT is None:
        features_FT = torch.empty((0, len(batch.tokens)), device=device)
    _check_features(features_FT, len(batch.tokens), device)
    # a launch goes to the current device, even if the pointers belong to another
    with torch.cuda.device(device):
        return _fill(batch, settings, dp_size, device, features_FT)


def _check_features(features_FT: torch.Tensor, tokens: int, device: torch.device) -> None:
    shape_fits = features_FT.ndim == 2 and features_FT.shape[1] == tokens
    kind_fits = features_FT.dtype == torch.float32 and features_FT.device.type == device.type
    if not (shape_fits and kind_fits and features_FT.is_contiguous()):
        raise ValueError(
            f"features_FT must be contiguous float32 [F, {tokens}] on {device}, not {features_FT.dtype} "
            f"{list(features_FT.shape)} on {features_FT.device}"
        )


def _queue(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns a copy on the device, made from pinned memory so that the host does not wait for it."""
    return torch.from_numpy(np.array(array)).pin_memory().to(device, non_blocking=True)


def _fill(
    batch: RolloutBatch,
    settings: PackingSettings,
    dp_size: int,
    device: torch.device,
    features_FT: torch.Tensor,
) -> dict[str, torch.Tensor]:
    plan = _C.Plan(batch, settings, dp_size)
    rows, response_rows = (int(plan.sizes[:, column].sum()) for column in (0, 2))
    host = [plan.copies, batch.prompt_tokens, batch.tokens, plan.headers]
    copies, prompts, responses, headers = (_queue(array, device) for array in host)
    out = {
        name: torch.empty(rows, dtype=torch.int32, device=device)
        for name in ("tokens_N", "positions_N", "labels_N")
    }
    out["gather_A"] = torch.empty(response_rows, dtype=torch.int64, device=device)
    out["features_FA"] = torch.empty(len(features_FT) * response_rows, device=device)
    _C_cuda.fill(
        copies=copies.data_ptr(),
        count=len(copies),
        prompt_tokens=prompts.data_ptr(),
        response_tokens=responses.data_ptr(),
        headers=headers.data_ptr(),
        features=features_FT.data_ptr(),
        feature_count=len(features_FT),
        response_token_count=len(responses),
        tokens=out["tokens_N"].data_ptr(),
        positions=out["positions_N"].data_ptr(),
        labels=out["labels_N"].data_ptr(),
        gather=out["gather_A"].data_ptr(),
        features_out=out["features_FA"].data_ptr(),
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    return out
