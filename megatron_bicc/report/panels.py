"""Which metrics stand in which chart of the report. docs/metrics.md says what they mean.

A metric that no panel names is drawn under "Other metrics", so that none is ever left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bicc.report.runs import Run

SOLID, DASHED, DOTTED, DASH_DOT = range(4)
HISTOGRAM = "contrast/right_"


@dataclass(frozen=True)
class Line:
    """A metric within a panel."""

    key: str
    label: str = ""
    dash: int = SOLID


@dataclass(frozen=True)
class Panel:
    """A chart over steps."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    smooth: bool = False
    """Draw a moving average over the values of long runs"""
    zero: bool = False
    """The axis begins at 0"""
    log: bool = False
    """Logarithmic axis"""
    band: tuple[str, str] | None = None
    """Two metrics between which the area is filled"""


def _one(title: str, caption: str, key: str, **options: bool) -> Panel:
    return Panel(title, caption, (Line(key),), **options)


def _quantiles(title: str, caption: str, prefix: str) -> Panel:
    lines = (
        Line(f"{prefix}/q50", "median"),
        Line(f"{prefix}/mean", "mean", DASH_DOT),
        Line(f"{prefix}/q01", "1 % quantile", DASHED),
        Line(f"{prefix}/q99", "99 % quantile", DASHED),
        Line(f"{prefix}/max", "largest", DOTTED),
    )
    return Panel(title, caption, lines, log=True, band=(f"{prefix}/q01", f"{prefix}/q99"))


def _clips(side: str) -> Panel:
    caption = f"Share of the tokens of {side} rollouts that each edge clips."
    edges = (("low", SOLID), ("high", DASHED), ("dual", DOTTED))
    lines = tuple(Line(f"clip/{side}/{edge}", edge, dash) for edge, dash in edges)
    return Panel(f"Clip fractions, {side}", caption, lines, zero=True)


SECTIONS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Learning",
        (
            _one("Reward", "Mean over the rollouts of a step.", "reward/mean", smooth=True),
            _one("pass@1", "Held-out prompts, sampled, given the prompt alone.", "eval/pass_at_1"),
            _one(
                "Pass rate", "Share of the step's rollouts that is correct.", "reward/pass_rate", smooth=True
            ),
        ),
    ),
    (
        "Groups and responses",
        (
            _one(
                "Groups with contrast",
                "Share with both right and wrong rollouts: only these are trained.",
                "contrast/share",
                zero=True,
            ),
            Panel(
                "Response length",
                "Tokens, the end-of-sequence token included.",
                (Line("rollout/length_mean", "mean"), Line("rollout/length_max", "longest", DASHED)),
                zero=True,
            ),
            _one(
                "Truncated", "Share of responses cut at the longest length.", "rollout/truncated", zero=True
            ),
        ),
    ),
    (
        "Confidence and baseline",
        (
            _one("Cov(R, δ)", "Reward and confidence, within groups.", "rcc/cov", smooth=True),
            _one(
                "Baseline shift", "Corrected baseline minus mean reward.", "rcc/baseline_shift", smooth=True
            ),
            _one(
                "Gap of δ", "Mean δ of the right minus that of the wrong rollouts.", "delta/gap", smooth=True
            ),
            Panel(
                "δ by side",
                "Mean token log-ratio of the policy to the reference.",
                (Line("delta/right", "right"), Line("delta/wrong", "wrong", DASHED)),
            ),
        ),
    ),
    (
        "Ratios and clipping",
        (
            _quantiles("Token ratio, right", "Policy over old policy, right rollouts.", "ratio/right"),
            _quantiles("Token ratio, wrong", "Policy over old policy, wrong rollouts.", "ratio/wrong"),
            _clips("right"),
            _clips("wrong"),
        ),
    ),
    (
        "Optimisation",
        (
            _one("Gradient norm", "Before clipping.", "train/grad_norm", smooth=True, zero=True),
            _one(
                "Gradient variance",
                "Estimated over groups.",
                "train/gradient_variance",
                smooth=True,
                zero=True,
            ),
            _one(
                "Gradient noise",
                "That variance over the squared norm.",
                "train/gradient_noise",
                smooth=True,
                zero=True,
            ),
            _one("Loss", "Not comparable between algorithms.", "train/loss", smooth=True),
            _one("Entropy", "Of the policy at response tokens, in nats.", "train/entropy", smooth=True),
            _one("Learning rate", "Of the step's first update.", "train/lr", zero=True),
            Panel(
                "KL a token",
                "k3 estimates.",
                (
                    Line("kl/old_new", "old policy and policy in training"),
                    Line("kl/old_ref", "policy and reference", DASHED),
                    Line("kl/rollout_old", "engine and trainer", DOTTED),
                ),
            ),
            _quantiles("Importance weights", "Trainer over rollout engine a token, before any cap.", "tis"),
        ),
    ),
    (
        "Tokens and time",
        (
            Panel(
                "Tokens trained",
                "Packed with shared prefixes, against one row a rollout: the gap is saved.",
                (Line("tokens/packed", "packed"), Line("tokens/rows", "one row a rollout", DASHED)),
                zero=True,
            ),
            _one("Context tokens", "Tokens of all contexts, headers included.", "tokens/context", zero=True),
            _one("Seconds a step", "Evaluation included, checkpoints not.", "time/step_s", zero=True),
        ),
    ),
)
STAGES = ("rollout", "logprob", "pack", "train", "sync", "eval")


def other_panels(runs: Sequence[Run]) -> list[Panel]:
    """A panel for every metric of the runs that no other chart shows."""
    shown = {line.key for _, panels in SECTIONS for panel in panels for line in panel.lines}
    shown |= {f"time/{stage}_s" for stage in STAGES} | {"step"}
    keys = {key for run in runs for record in run.records for key in record}
    keys -= {f"{key}_stderr" for key in keys}
    return [_one(key, "", key) for key in sorted(keys - shown) if not key.startswith(HISTOGRAM)]
