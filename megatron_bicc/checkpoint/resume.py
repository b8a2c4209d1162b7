"""Finds the checkpoint to resume from, and checks that settings and files are of the same experiment."""

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bicc.checkpoint.checkpoint import Progress, checkpoints, read_progress
from megatron_bicc.config import RENAMED, Config, flatten, in_mapping, setting_of
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import METRICS_FILE
from megatron_bicc.weights.hf_files import fingerprint

logger = logging.getLogger(__name__)

WEIGHTS = "model.path (weights)"
TRAIN_IDS, HELD_OUT_IDS = "data.train (token ids)", "evaluation.data (token ids)"
_OTHER_IDS = (
    "its prompts have other token ids or ground truths; if nothing else is named here, the version of "
    "transformers or of this program has changed, or the chat template's output varies"
)
_PRECISION = ("megatron.transformer.fp8", "megatron.transformer.fp4")
"""Beginnings of the names in a mapping that change the policy's arithmetic as model.dtype does"""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from."""

    path: Path
    progress: Progress

    @property
    def date(self) -> str:
        """data.date of the run that wrote the checkpoint; empty if it had none."""
        return str(flatten(self.progress.config).get("data.date", ""))


def resume_point(config: Config, first_process: bool) -> ResumePoint | None:
    """Returns the newest checkpoint if checkpoint.resume is set; None: the run starts at step 0.

    Reads progress.json only. Logs a line if there is no checkpoint. Raises CheckpointError for a damaged one.
    """
    if not config.checkpoint.resume:
        return None
    root = Path(config.output_dir)
    found = checkpoints(config.output_dir)
    if found:
        return ResumePoint(found[-1], read_progress(found[-1]))
    if first_process:
        lost = (root / METRICS_FILE).exists()
        logger.warning(
            "checkpoint.resume: there is no checkpoint in %s; starting at step 0%s",
            root / "checkpoints",
            f" with a new {METRICS_FILE}" if lost else "",
        )
    return None


def check_resume(progress: Progress, config: Config, contents: dict[str, str], first_process: bool) -> None:
    """Logs the settings and files that have changed since the checkpoint.

    contents: startup.Inputs.contents. Raises UserError that names the changes that would make it another
    experiment, unless checkpoint.force is set. A file that was moved and has the same content is not a
    change.
    """
    # a setting that is newer than the checkpoint was at its default
    before = flatten(asdict(Config())) | {
        RENAMED.get(name, name): value for name, value in flatten(progress.config).items()
    }
    changed = _changes(before, flatten(asdict(config)))
    same_files = {name for name in contents if progress.contents.get(name) == contents[name]}
    # checkpoints of older versions hold nothing of the weights and the token ids
    other_files = (contents.keys() & progress.contents.keys()) - same_files
    edited = dict.fromkeys(sorted(other_files - changed.keys()), "its content has changed")
    dangerous = [n for n in [*changed, *edited] if _changes_experiment(n) and n not in same_files]
    words = {**changed, **edited}
    words |= {name: _OTHER_IDS for name in (TRAIN_IDS, HELD_OUT_IDS) if name in edited}
    if dangerous and not config.checkpoint.force:
        listed = "; ".join(f"{name}: {words[name]}" for name in dangerous)
        raise UserError(
            f"checkpoint.resume: settings differ from those of step {progress.step}: {listed}; "
            "set them back; to resume anyway, set checkpoint.force=true"
        )
    for name in words if first_process else ():
        logger.warning("changed since step %d: %s: %s", progress.step, name, words[name])


def _changes_experiment(name: str) -> bool:
    """Returns whether a change makes it another experiment. name: a setting, or an entry such as WEIGHTS."""
    return name.startswith(_PRECISION) or setting_of(name.partition(" ")[0]).rule.changes_experiment


def digests_of_files(config: Config) -> dict[str, str]:
    """Returns SHA-256 sums of the training prompts, and of the policy's files and weights."""
    files, weights = fingerprint(config.model.path)
    train = hashlib.sha256(Path(config.data.train).read_bytes())
    return {"model.path": files, WEIGHTS: weights, "data.train": train.hexdigest()}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    # also what is no longer set in a mapping, but not settings that config.py no longer has
    names = [*now, *(name for name in before if name not in now and in_mapping(name))]
    shown = {name: (before.get(name, "not set"), now.get(name, "not set")) for name in names}
    return {name: f"was {was}, is {is_now}" for name, (was, is_now) in shown.items() if was != is_now}
