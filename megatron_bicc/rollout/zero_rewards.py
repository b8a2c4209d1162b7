"""Why every reward of a run is 0: answers that are not read, responses that are cut off, or wrong answers."""

from megatron_bicc.rewards.extraction import STYLES, Style, final_answer
from megatron_bicc.rollout.types import Group

STEPS = 3
"""Steps in a row without a reward after which it is said"""


class ZeroRewardWatch:
    """Looks for steps in a row in which every reward is 0, from this process's first step on."""

    def __init__(self, style: Style, enabled: bool) -> None:
        """style: reward.answer; enabled: on one process."""
        self._style, self._enabled = style, enabled
        self._zero: list[list[Group]] = []
        self._had_rewards = False

    def see(self, groups: list[Group]) -> str | None:
        """Takes a step's groups; gives the likely reason, in one line and once per such row."""
        if not self._enabled:
            return None
        if _has_reward(groups):
            self._zero, self._had_rewards = [], True
            return None
        if len(self._zero) == STEPS:  # it has been said
            return None
        self._zero.append(groups)
        if len(self._zero) < STEPS:
            return None
        why = f"in the last {STEPS} steps {why_all_zero(sum(self._zero, []), self._style)}"
        if self._had_rewards:
            why += (
                "; there were rewards before: if the policy has collapsed, resume from an earlier checkpoint "
                "with a lower optimizer.lr"
            )
        return why


def _has_reward(groups: list[Group]) -> bool:
    return any(group.rewards.any() for group in groups)


def why_all_zero(groups: list[Group], style: Style) -> str | None:
    """The likely reason, in one line; None if a reward is not 0 or there is none."""
    if not groups or _has_reward(groups):
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
