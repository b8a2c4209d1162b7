"""Exports the policy as a Hugging Face directory, for transformers and every engine that reads the format.

OUTPUT_DIR/exports/step_00000050    during training
OUTPUT_DIR/hf                       at the end
"""

import re
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_bicc.checkpoint.checkpoint import CheckpointError
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.policy import Policy
from megatron_bicc.weights.hf_weights import save_hf


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


def forget_exports(output_dir: str, step: int) -> None:
    """Removes the exports after a step, unfinished ones included, before a run resumes from its checkpoint.

    They belong to the discarded part of the run, and would count as the newest. For one rank only. Raises
    CheckpointError if one cannot be removed.
    """
    for path in (Path(output_dir) / "exports").glob("step_*"):
        found = re.match(r"step_(\d{8})(\.|$)", path.name)
        if found and int(found[1]) > step:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from error


def export(policy: Policy, config: Config, target: Path) -> None:
    """Exports the policy as it is. Collective. Raises CheckpointError if it cannot be written."""
    try:
        save_hf(policy.modules, policy.hf_config, Path(config.model.path), target, dist.get_rank() == 0)
    except UserError as error:
        raise CheckpointError(f"{error}; free space and resume with checkpoint.resume=true") from error
