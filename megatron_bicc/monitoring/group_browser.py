"""The groups that the report shows rollout by rollout, as the data that report.js reads."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_bicc.monitoring.curves import evenly

# A page of this many characters of prompts, contexts and rollouts opens at once.
MAX_CHARACTERS = 4_000_000
# Control characters, those that reorder the text around them, and lone surrogates that no encoding takes.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with a mark in place of what cannot be shown or would change how the rest is shown."""
    return _UNPRINTABLE.sub("�", text)


def browser_groups(recorded: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """The groups of every run for the page, spread over each run's steps where they are too many.

    Returns {"groups": [...], "left_out": number of groups that found no room}.
    """
    share = MAX_CHARACTERS // max(len(recorded), 1)
    shown = [_fit(groups, share) for groups in recorded]
    return {
        "groups": [_present(i, group) for i, groups in enumerate(shown) for group in groups],
        "left_out": sum(map(len, recorded)) - sum(map(len, shown)),
    }


def _fit(groups: list[dict[str, Any]], characters: int) -> list[dict[str, Any]]:
    """As many groups as fit, evenly from end to end."""
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
    """Rollouts that are alike in everything stand once, with their number."""
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
