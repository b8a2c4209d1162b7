"""Why every reward of a run is 0: answers that are not read, responses that are cut off, or wrong answers."""

from megatron_bicc.rewards.extraction import STYLES, Style, final_answer
from megatron_bicc.rollout.types import Group

FIRST_STEPS = 3
"""Steps after which it is said"""


class ZeroRewardWatch:
    """Looks at the first steps of a run. A resumed run is past them."""

    def __init__(self, style: Style, first_step: int, enabled: bool) -> None:
        """style: reward.answer; first_step: steps that are finished; enabled: on one process."""
        self._style = style
        self._groups: list[Group] | None = [] if enabled and first_step == 0 else None
        self._steps = 0

    def see(self, groups: list[Group]) -> str | None:
        """Takes a step's groups; gives the reason, in one line and once, if the first steps got only 0."""
        if self._groups is None:
            return None
        self._groups += groups
        self._steps += 1
        why = why_all_zero(self._groups, self._style)
        if why is None or self._steps == FIRST_STEPS:
            self._groups = None
        return f"after {FIRST_STEPS} steps {why}" if why and self._groups is None else None


def why_all_zero(groups: list[Group], style: Style) -> str | None:
    """The likely reason, in one line; None if a reward is not 0 or there is none."""
    if not groups or any(group.rewards.any() for group in groups):
        return None
    texts = [text for group in groups for text in group.texts]
    cut = sum(sample.finish_reason == "length" for group in groups for sample in group.samples)
    unread = [text for text in texts if not final_answer(text, style)]
    return (
        f"all {len(texts)} rewards are 0: {len(unread) / len(texts):.0%} of the responses have no answer "
        f"that reward.answer={style} reads, {cut / len(texts):.0%} were cut off at rollout.max_new_tokens; "
        f"one ends in {(unread or texts)[0][-60:]!r}; {_remedy(texts, unread, cut)}"
    )


def _remedy(texts: list[str], unread: list[str], cut: int) -> str:
    if 2 * len(unread) >= len(texts):
        reads = {name: sum(bool(final_answer(text, name)) for text in unread) for name in STYLES}
        best = max(reads, key=lambda name: reads[name])
        if 2 * cut >= len(texts):
            return "raise rollout.max_new_tokens"
        if 2 * reads[best] >= len(unread):
            return f"set reward.answer={best}, or ask for another form of answer by data.instruction"
        return "ask for a marked answer, such as \\boxed{X}, by data.instruction"
    return "the answers are read and wrong: train on easier prompts, or check the ground truths"
