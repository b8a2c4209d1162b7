"""Prepares single steps for the report: their groups, rollout by rollout, and their packed layout.

Groups become the JSON that report.js reads. A packed micro-batch becomes a bar, to scale, of SVG paths.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron_bicc.report.charts import evenly
from megatron_bicc.report.runs import Run

# A browser opens a page with this many characters of prompts, contexts and rollouts without delay.
MAX_CHARACTERS = 4_000_000
# Control characters, characters that reorder the text around them, and lone surrogates, which UTF-8 lacks.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Replaces characters that cannot be shown, or would change the text around them, by a mark."""
    return _UNPRINTABLE.sub("�", text)


def browser_groups(recorded: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the data of the group browser: {"groups": [...], "left_out": number left out for size}.

    If a run has too many groups, some are chosen evenly over its steps.
    """
    share = MAX_CHARACTERS // max(len(recorded), 1)
    shown = [_fit(groups, share) for groups in recorded]
    return {
        "groups": [_present(i, group) for i, groups in enumerate(shown) for group in groups],
        "left_out": sum(map(len, recorded)) - sum(map(len, shown)),
    }


def _fit(groups: list[dict[str, Any]], characters: int) -> list[dict[str, Any]]:
    """Returns as many groups as fit, evenly spaced."""
    count = len(groups)
    chosen = evenly(groups, count)
    while sum(map(_size, chosen)) > characters:
        count = count * 3 // 4
        chosen = evenly(groups, count)
    return chosen


def _size(group: dict[str, Any]) -> int:
    contexts = {rollout["context"] for rollout in group["rollouts"]}
    texts = [group["prompt"], *contexts, *(rollout["text"] for rollout in group["rollouts"])]
    return sum(map(len, texts))


def _present(run: int, group: dict[str, Any]) -> dict[str, Any]:
    """Returns one group for the page; identical rollouts are merged and counted."""
    correct = [bool(rollout["correct"]) for rollout in group["rollouts"]]
    contexts = list(dict.fromkeys(rollout["context"] for rollout in group["rollouts"]))
    alike = Counter(
        (rollout["text"], right, f"{rollout['reward']:g}", f"{rollout['advantage']:+.2f}", rollout["context"])
        for rollout, right in zip(group["rollouts"], correct, strict=True)
    )
    return {
        "run": run,
        "step": group["step"],
        "prompt": printable(group["prompt"]),
        "truth": printable(group["ground_truth"]),
        "outcome": "right" if all(correct) else "mixed" if any(correct) else "wrong",
        "right": sum(correct),
        "wrong": len(correct) - sum(correct),
        "contexts": [printable(context) for context in contexts],
        "rollouts": [
            {
                "text": printable(text),
                "count": count,
                "correct": right,
                "reward": reward,
                "advantage": advantage,
                "context": contexts.index(context),
            }
            for (text, right, reward, advantage, context), count in alike.items()
        ],
    }


WIDTH, HEIGHT, GAP = 1000, 20, 1.2
STEPS_SHOWN, BARS_SHOWN = 8, 24
# Right sides are drawn higher in a bar than wrong ones, so that colour is not the only difference.
BANDS = {"right": (0, 15), "wrong": (5, 15), "both": (0, 20)}


@dataclass(frozen=True)
class BarPart:
    """The rows of one side of a group within a bar."""

    title: str
    prefix_class: str
    prefix_path: str
    responses: list[tuple[str, str]]
    """(label, path) of the right and of the wrong responses"""


@dataclass(frozen=True)
class Bar:
    """A micro-batch as a bar."""

    caption: str
    parts: list[BarPart]
    padding_path: str
    budget_x: float
    """x of train.max_tokens_per_microbatch, in units of the bar"""


@dataclass(frozen=True)
class StepLayout:
    """The micro-batches of a step in one layout, bilateral or plain."""

    name: str
    summary: str
    bars: list[Bar]
    bars_left_out: int


def step_layouts(run: Run, recorded: Sequence[dict[str, Any]]) -> list[StepLayout]:
    """Returns the layouts of at most STEPS_SHOWN of a run's recorded steps, evenly spaced."""
    return [
        _step_layout(run, record, plan)
        for record in evenly(recorded, STEPS_SHOWN)
        for plan in record["plans"]
    ]


def _step_layout(run: Run, record: dict[str, Any], plan: dict[str, Any]) -> StepLayout:
    numbered = [(i, j, b) for i, rank in enumerate(plan["ranks"]) for j, b in enumerate(rank)]
    scale = WIDTH / max([record["budget"], *(_rows(b) for _, _, b in numbered)])
    bars = [
        _bar(f"Rank {i}, micro-batch {j + 1}", b, record["budget"], scale)
        for i, j, b in numbered[:BARS_SHOWN]
    ]
    groups = {side["group"] for _, _, b in numbered for side in b["sides"]}
    rows = sum(_rows(b) for _, _, b in numbered)
    kind = "with context" if plan["context"] else "prompt alone"
    summary = (
        f"Groups: {len(groups)}; micro-batches: {len(numbered)}; data-parallel ranks: {len(plan['ranks'])}; "
        f"rows: {rows:,}."
    )
    name = f"{run.name}, step {record['step']}, {kind}"
    return StepLayout(name, summary, bars, len(numbered) - len(bars))


def _rows(micro_batch: dict[str, Any]) -> int:
    sides = micro_batch["sides"]
    return micro_batch["padding"] + sum(side["prefix"] + sum(side["responses"]) for side in sides)


def _bar(name: str, micro_batch: dict[str, Any], budget: int, scale: float) -> Bar:
    sides, rows = micro_batch["sides"], _rows(micro_batch)
    prefix_starts = list(accumulate((side["prefix"] for side in sides), initial=0))
    starts = list(accumulate((sum(side["responses"]) for side in sides), initial=prefix_starts[-1]))
    parts = [_part(side, prefix_starts[i] * scale, starts[i] * scale, scale) for i, side in enumerate(sides)]
    counts = {
        "prefix": prefix_starts[-1],
        "right": sum(n for side in sides for n, right in _responses(side) if right),
        "wrong": sum(n for side in sides for n, right in _responses(side) if not right),
        "padding": micro_batch["padding"],
    }
    parted = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    caption = f"{name}: {rows:,} of {budget:,} rows ({rows / budget:.0%}): {parted}"
    padding = _piece(starts[-1] * scale, micro_batch["padding"] * scale, "both")
    return Bar(caption, parts, padding, budget * scale)


def _part(side: dict[str, Any], prefix_x: float, x: float, scale: float) -> BarPart:
    kinds = set(side["correct"])
    kind = "both" if len(kinds) > 1 else "right" if True in kinds else "wrong"
    paths = {"right": "", "wrong": ""}
    for rows, correct in _responses(side):
        label = "right" if correct else "wrong"
        paths[label] += _piece(x, rows * scale, label)
        x += rows * scale
    title = (
        f"group {side['group'] + 1}, {kind if kind != 'both' else 'right and wrong'}: prefix of "
        f"{side['prefix']:,} rows, {len(side['responses'])} responses of {sum(side['responses']):,} rows"
    )
    prefix = _piece(prefix_x, side["prefix"] * scale, kind)
    return BarPart(title, f"prefix {kind}", prefix, [(k, path) for k, path in paths.items() if path])


def _responses(side: dict[str, Any]) -> list[tuple[int, bool]]:
    return list(zip(side["responses"], side["correct"], strict=True))


def _piece(x: float, width: float, band: str) -> str:
    """Returns the path of a rectangle; if it is wide enough, it leaves a gap before the next one."""
    if not width:
        return ""
    y, height = BANDS[band]
    drawn = width - GAP if width > 3 * GAP else width
    return f"M{x:.1f} {y}h{drawn:.1f}v{height}h-{drawn:.1f}z"
