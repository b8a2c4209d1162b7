"""Whether a run may go on from a checkpoint under the settings that it is given now."""

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bicc.checkpoint.checkpoint import Progress, checkpoints, read_progress
from megatron_bicc.config import RENAMED, Config, flatten, settings
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import METRICS_FILE
from megatron_bicc.rollout.sampling import Collector
from megatron_bicc.weights.hf_files import fingerprint

_log = logging.getLogger(__name__)

WEIGHTS = "model.path (weights)"
TRAIN_IDS, HELD_OUT_IDS = "data.train (token ids)", "evaluation.data (token ids)"
_OTHER_IDS = (
    "its prompts have other token ids or ground truths; besides what else is named here, the version of "
    "transformers or of this program may have changed, or the chat template's output varies"
)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run may go on from."""

    path: Path
    progress: Progress


def resume_point(
    config: Config, prompt_digests: dict[str, str], collector: Collector, first_process: bool
) -> ResumePoint | None:
    """The checkpoint that the run goes on from, and the collector as it then was; None: it starts at step 0.

    prompt_digests: setup_run.Inputs. Reads nothing of the weights. Raises UserError, one line, for a damaged
    checkpoint and as `check_resume` does.
    """
    newest = newest_checkpoint(config, first_process)
    if newest is None:
        return None
    saved = read_progress(newest)
    check_resume(saved, config, prompt_digests, first_process)
    collector.load_state_dict(saved.sampler)
    return ResumePoint(newest, saved)


def date_of_checkpoint(config: Config) -> str:
    """data.date of the checkpoint that the run goes on from; empty if there is none or it has none."""
    found = checkpoints(config.output_dir) if config.checkpoint.resume else []
    return str(flatten(read_progress(found[-1]).config).get("data.date", "")) if found else ""


def newest_checkpoint(config: Config, first_process: bool) -> Path | None:
    """What the run goes on from; None: it starts at step 0, and says so if it was to go on."""
    if not config.checkpoint.resume:
        return None
    root = Path(config.output_dir)
    found = checkpoints(config.output_dir)
    if not found and first_process:
        lost = (root / METRICS_FILE).exists()
        _log.warning(
            "checkpoint.resume: there is no checkpoint in %s; starting at step 0%s",
            root / "checkpoints",
            f", and {METRICS_FILE} anew" if lost else "",
        )
    return found[-1] if found else None


def check_resume(
    progress: Progress, config: Config, prompt_digests: dict[str, str], first_process: bool
) -> None:
    """Logs the settings that have changed since the checkpoint.

    Raises UserError naming those that make another experiment of the run, unless checkpoint.force. A file
    that was moved and holds the same is no change.
    """
    # a setting that is newer than the checkpoint was at its default
    before = flatten(asdict(Config())) | {
        RENAMED.get(name, name): value for name, value in flatten(progress.config).items()
    }
    changed = _changes(before, flatten(asdict(config)))
    now = contents(config) | prompt_digests
    same_files = {name for name in now if progress.contents.get(name) == now[name]}
    # checkpoints of older versions hold nothing of the weights and the token ids
    other_files = (now.keys() & progress.contents.keys()) - same_files
    edited = dict.fromkeys(sorted(other_files - changed.keys()), "its content has changed")
    dangerous = [n for n in [*changed, *edited] if _changes_experiment(n) and n not in same_files]
    words = {**changed, **edited}
    words |= {name: _OTHER_IDS for name in (TRAIN_IDS, HELD_OUT_IDS) if name in edited}
    if dangerous and not config.checkpoint.force:
        listed = "; ".join(f"{name}: {words[name]}" for name in dangerous)
        raise UserError(
            f"checkpoint.resume: not the settings of step {progress.step}: {listed}; "
            "set them back, or go on all the same by checkpoint.force=true"
        )
    for name in words if first_process else ():
        _log.warning("changed since step %d: %s: %s", progress.step, name, words[name])


def _changes_experiment(name: str) -> bool:
    """name: a setting, or one with what is read from its files in parentheses, such as WEIGHTS."""
    return settings()[name.partition(" ")[0]].rule.changes_experiment


def contents(config: Config) -> dict[str, str]:
    """Returns SHA-256 of what a run reads: training prompts, and the policy's files and weights."""
    files, weights = fingerprint(config.model.path)
    train = hashlib.sha256(Path(config.data.train).read_bytes())
    return {"model.path": files, WEIGHTS: weights, "data.train": train.hexdigest()}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {name: f"was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]}
