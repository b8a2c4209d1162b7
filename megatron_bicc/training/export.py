"""The policy as a Hugging Face directory, which transformers and the engines that read its format load.

OUTPUT_DIR/exports/step_00000050    while it is trained
OUTPUT_DIR/hf                       at the end
"""

import re
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_bicc.config import Config
from megatron_bicc.policy.hf_weights import save_hf
from megatron_bicc.policy.policy import Policy
from megatron_bicc.training.checkpoint import CheckpointError


def export_step(policy: Policy, config: Config, step: int) -> None:
    """Exports the policy after a step, and removes all but the newest export.keep. Collective.

    Raises CheckpointError if it cannot be written.
    """
    root = Path(config.output_dir) / "exports"
    export(policy, config, root / f"step_{step:08d}")
    if dist.get_rank() == 0:
        whole = sorted(p for p in root.iterdir() if re.fullmatch(r"step_\d{8}", p.name))
        for old in whole[: -config.export.keep]:
            shutil.rmtree(old)


def export(policy: Policy, config: Config, target: Path) -> None:
    """Exports the policy as it is. Collective. Raises CheckpointError if it cannot be written."""
    try:
        save_hf(policy.modules, policy.hf_config, Path(config.model.path), target, dist.get_rank() == 0)
    except ValueError as error:
        raise CheckpointError(f"{error}; free space and go on by checkpoint.resume=true") from error
