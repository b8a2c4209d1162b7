"""The packer's fill on a GPU: planned on the host, one launch on the current stream. Needs the CUDA build.

Shape suffixes: K channels, N response tokens of the batch.
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
    channels_KN: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Packs a step straight into GPU memory, without synchronising.

    Args:
        batch: the scored groups, on the host.
        settings: layout, contexts and budgets.
        dp_size: number of data-parallel ranks.
        device: where the rows go.
        channels_KN: float32 [K, response tokens] on `device`, gathered like the labels.

    Returns:
        "tokens_T", "positions_T", "labels_T" (int32), "gather" (int64) and "channels" (float32): flat, the
        arrays of all micro-batches of megatron_bicc.packing.pack one after another, rank by rank.

    Raises:
        ValueError: as megatron_bicc.packing.pack does.
    """
    plan = _C.Plan(batch, settings, dp_size)
    rows, response_rows = (int(plan.sizes[:, column].sum()) for column in (0, 2))
    host = [plan.copies, batch.prompt_tokens, batch.tokens, plan.headers]
    copies, prompts, responses, headers = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in host)
    if channels_KN is None:
        channels_KN = torch.empty((0, len(responses)), device=device)
    out = {
        name: torch.empty(rows, dtype=torch.int32, device=device)
        for name in ("tokens_T", "positions_T", "labels_T")
    }
    out["gather"] = torch.empty(response_rows, dtype=torch.int64, device=device)
    out["channels"] = torch.empty(len(channels_KN) * response_rows, device=device)
    _C_cuda.fill(
        copies=copies.data_ptr(),
        count=len(copies),
        prompt_tokens=prompts.data_ptr(),
        response_tokens=responses.data_ptr(),
        headers=headers.data_ptr(),
        channels=channels_KN.data_ptr(),
        channel_count=len(channels_KN),
        response_token_count=len(responses),
        tokens=out["tokens_T"].data_ptr(),
        positions=out["positions_T"].data_ptr(),
        labels=out["labels_T"].data_ptr(),
        gather=out["gather"].data_ptr(),
        channels_out=out["channels"].data_ptr(),
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
    return out
