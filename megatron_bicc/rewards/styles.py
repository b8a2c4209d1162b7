"""What prompts ask for and what is read: said at start-up, as a wrong pair makes every reward 0."""

from megatron_bicc.data import Prompt
from megatron_bicc.rewards.extraction import STYLES, Style, asked_styles
from megatron_bicc.rewards.registry import RESPONSES, get_verifier

LOOKED_AT = 64
"""Prompts, from the first, that are looked at"""


def describe_styles(verifier: str, style: Style, prompts: list[Prompt]) -> str:
    """How many truths each style reads, and how many prompts ask for which; one line."""
    first = prompts[:LOOKED_AT]
    truths = [prompt.ground_truth for prompt in first]
    reads = []
    for name in STYLES:
        if name != "auto":
            responses = [RESPONSES[verifier](truth, name) for truth in truths]
            reads.append(f"{name} {int(get_verifier(verifier, name)(responses, truths).sum())}")
    asked = [f"{STYLES[name].shown} ({count})" for name, count in _asked(prompts).items() if count]
    wanted = f"prompts ask for {', '.join(asked)}" if asked else "no prompt asks for a marked answer"
    return f"reward.answer={style}; of the first {len(first)} truths are read: {', '.join(reads)}; {wanted}"


def style_mismatch(style: Style, prompts: list[Prompt]) -> str | None:
    """One line where most prompts ask for a marker and none for the one that is read."""
    asked = _asked(prompts)
    most = max(asked, key=lambda name: asked[name])
    if style in ("auto", "last_number") or asked[style] or 2 * asked[most] < len(prompts[:LOOKED_AT]):
        return None
    return (
        f"reward.answer is {style}, but the prompts ask for {STYLES[most].shown}: an answer that "
        f"obeys them scores 0; set reward.answer={most}"
    )


def _asked(prompts: list[Prompt]) -> dict[Style, int]:
    """Of the first prompts, how many show the marker of each style that has one."""
    counts: dict[Style, int] = {name: 0 for name, style in STYLES.items() if style.marker}
    for prompt in prompts[:LOOKED_AT]:
        for name in asked_styles("\n".join(message["content"] for message in prompt.messages)):
            counts[name] += 1
    return counts
