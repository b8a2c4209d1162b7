"""Run directories, written by the package's own writer, for the tests of the report."""

import re
from pathlib import Path

from megatron_bicc.metrics import MetricsWriter, write_groups, write_layout, write_settings

REPOSITORY = Path(__file__).parents[2]


def documented_metrics() -> list[str]:
    """Returns every key that docs/metrics.md documents, for both sides and for groups of four."""
    keys: list[str] = []
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    for cell in re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            keys.append(re.sub(r"[^/]+$", name[1:], keys[-1]) if name.startswith("/") else name)
    keys = [key for key in keys if re.fullmatch(r"\w+(/\w+)+", key)]
    return [spelled for key in keys for spelled in _spell(key)]


def _spell(key: str) -> list[str]:
    if "_N_" in key:
        return [key.replace("_N_", f"_{n}_").replace("_M", f"_{4 - n}") for n in range(5)]
    return [key.replace("SIDE", side) for side in ("right", "wrong")] if "SIDE" in key else [key]


def rollout(text: str, correct: bool, context: str) -> dict:
    return {
        "text": text,
        "reward": float(correct),
        "advantage": 1.25 if correct else -0.75,
        "correct": correct,
        "context": context,
    }


def group(number: int, right: int = 2, wrong: int = 3, context: str = "seen: ") -> dict:
    """Returns a group with the prompt "prompt-NUMBER"; each side's context names the other side."""
    contexts = [context + "wrong ones", context + "right ones"] if context and right and wrong else ["", ""]
    rollouts = [rollout(f"right-{number}-{i}", True, contexts[0]) for i in range(right)]
    rollouts += [rollout(f"wrong-{number}-{i}", False, contexts[1]) for i in range(wrong)]
    return {"prompt": f"prompt-{number}", "ground_truth": "109", "rollouts": rollouts}


def layout() -> dict:
    """Returns one group in two micro-batches of 100 rows on two ranks: right side, wrong side, padding."""
    right = {"group": 0, "prefix": 30, "responses": [20, 25], "correct": [True, True]}
    wrong = {"group": 0, "prefix": 40, "responses": [10, 10, 11], "correct": [False, False, False]}
    ranks = [[{"padding": 0, "sides": [right]}], [{"padding": 1, "sides": [wrong]}]]
    return {"budget": 100, "plans": [{"context": True, "ranks": ranks}]}


def make_run(directory: Path, steps: int = 30, bicc: bool = True) -> Path:
    """Writes a run with the metrics that the tests need and a group at every step."""
    writer = MetricsWriter(directory, tensorboard=False, wandb_project="")
    writer.write(0, {"eval/pass_at_1": 0.5})
    for step in range(1, steps + 1):
        metrics = {
            "reward/mean": 0.5 + step / 100,
            "train/grad_norm": 1.5,
            "tokens/packed": 1000.0,
            "tokens/rows": 2600.0,
            "time/step_s": 2.0,
            "time/rollout_s": 1.25,
        }
        if bicc:
            metrics["rcc/cov"] = 0.01 * step
        if step % 10 == 0:
            metrics["eval/pass_at_1"] = 0.5 + step / 75
        writer.write(step, metrics)
        write_groups(directory, step, [group(step, context="seen: " if bicc else "")])
    return directory


def make_full_run(directory: Path, steps: int, groups: list[dict], settings: dict) -> Path:
    """Writes a run with every documented metric at each step; groups and a layout at every third step."""
    writer = MetricsWriter(directory, tensorboard=False, wandb_project="")
    write_settings(directory, settings)
    keys = documented_metrics()
    for step in range(1, steps + 1):
        writer.write(step, {key: 0.2 + (i + step * 7) % 11 / 13 for i, key in enumerate(keys)})
        if step % 3 == 0:
            write_groups(directory, step, groups)
            write_layout(directory, step, layout())
    return directory
