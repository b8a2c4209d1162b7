"""The scored answers to one prompt, and the file that keeps those of a benchmark."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bicc.monitoring import jsonl
from megatron_bicc.rollout.types import Group


@dataclass(frozen=True)
class Answers:
    """What was answered to one prompt; every list has an entry a sample."""

    index: int
    """Row of the prompt in its file, from 0"""
    rewards: list[float]
    lengths: list[int]
    """Tokens, the end token included"""
    truncated: list[bool]
    """Whether the sample ended at rollout.max_new_tokens"""
    texts: list[str]


def answers_of(group: Group) -> Answers:
    """The answers of a scored group."""
    return Answers(
        group.prompt.index,
        [float(reward) for reward in group.rewards],
        [len(sample.token_ids) for sample in group.samples],
        [sample.finish_reason == "length" for sample in group.samples],
        group.texts,
    )


class AnswerFile:
    """A .jsonl file: first a line with what decides the figures, then a line a finished prompt."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """settings: JSON values by name."""
        self.path, self.settings = path, settings

    def load(self) -> dict[int, Answers]:
        """Answers by prompt index; none if there is no file.

        Raises ValueError that names the settings under which the file was made, where they are others, or a
        line that is no answer.
        """
        records = jsonl.read(self.path) if self.path.exists() else []
        if not records:
            self.path.unlink(missing_ok=True)
            return {}
        self._check(records[0].get("settings"))
        return dict(self._answer(number, record) for number, record in enumerate(records[1:], start=2))

    def kept_settings(self) -> dict[str, Any]:
        """The settings under which the file was made; none if there is no file, or none in it."""
        records = jsonl.read(self.path) if self.path.exists() else []
        found = records[0].get("settings") if records else None
        return found if isinstance(found, dict) else {}

    def keep(self, indices: set[int]) -> None:
        """Drops the answers to all other prompts."""
        if not self.path.exists():
            return
        jsonl.keep(self.path, lambda record: "settings" in record or record["index"] in indices)

    def append(self, answers: Iterable[Answers]) -> None:
        """Returns once they are on disk. A new file begins with the settings."""
        if not self.path.exists():
            jsonl.append(self.path, [{"settings": self.settings}])
        jsonl.append(self.path, (asdict(one) for one in answers))

    def _answer(self, number: int, record: dict[str, Any]) -> tuple[int, Answers]:
        try:
            return record["index"], Answers(**record)
        except (KeyError, TypeError):
            raise ValueError(f"{self.path}, line {number}: not an answer; remove the line") from None

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}, line 1: no settings; delete the file, or give another --out")
        names = found.keys() | self.settings.keys()
        differ = sorted(n for n in names if found.get(n) != self.settings.get(n))
        if differ:
            listed = "; ".join(f"{n} was {found.get(n)!r}, is {self.settings.get(n)!r}" for n in differ)
            raise ValueError(
                f"{self.path}: made with other settings: {listed}; set them back, or give another --out"
            )
