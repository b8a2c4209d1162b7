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
    """Tokens, the end-of-sequence token included"""
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
        """Answers by prompt index; starts the file if there is none.

        Raises ValueError that names the settings under which the file was made, where they are others.
        """
        records = jsonl.read(self.path) if self.path.exists() else []
        if not records:
            self.path.unlink(missing_ok=True)
            jsonl.append(self.path, [{"settings": self.settings}])
            return {}
        self._check(records[0].get("settings", {}))
        return {record["index"]: Answers(**record) for record in records[1:]}

    def keep(self, indices: set[int]) -> None:
        """Drops the answers to all other prompts."""
        jsonl.keep(self.path, lambda record: "settings" in record or record["index"] in indices)

    def append(self, answers: Iterable[Answers]) -> None:
        """Returns once they are on disk."""
        jsonl.append(self.path, (asdict(one) for one in answers))

    def _check(self, found: dict[str, Any]) -> None:
        names = found.keys() | self.settings.keys()
        differ = sorted(n for n in names if found.get(n) != self.settings.get(n))
        if differ:
            listed = "; ".join(f"{n} was {found.get(n)!r}, is {self.settings.get(n)!r}" for n in differ)
            raise ValueError(
                f"{self.path}: made with other settings: {listed}; set them back, or give another --out"
            )
