"""Assigns metrics to the charts of the report. docs/metrics.md explains the metrics.

Metrics that no panel names are drawn under "Other metrics", so none is left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bicc.report.runs import Run

SOLID, DASHED, DOTTED, DASH_DOT = range(4)
HISTOGRAM = "contrast/right_"
LAYERS = "moe/load/layer_"
STALENESS = re.compile(r"(.*/staleness_)\d+")


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
    """Draw a moving average over the values of a long run"""
    zero: bool = False
    """The y axis begins at 0"""
    log: bool = False
    """Logarithmic y axis"""
    band: tuple[str, str] | None = None
    """Two metrics; the area between them is filled"""


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
    caption = f"Share of the tokens of {side} rollouts clipped at each bound."
    edges = (("low", SOLID), ("high", DASHED), ("dual", DOTTED))
    lines = tuple(Line(f"clip/{side}/{edge}", edge, dash) for edge, dash in edges)
    return Panel(f"Clip fractions, {side}", caption, lines, zero=True)


SECTIONS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Learning",
        (
            _one("Reward", "Mean over the rollouts of a step.", "reward/mean", smooth=True),
            _one("pass@1", "Sampled on held-out prompts, without a context.", "eval/pass_at_1"),
            _one("Pass rate", "Share of correct rollouts.", "reward/pass_rate", smooth=True),
        ),
    ),
    (
        "Groups and responses",
        (
            _one(
                "Groups with contrast",
                "Share of groups with both right and wrong rollouts; only these are trained.",
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
                "Truncated",
                "Share of responses cut off at rollout.max_new_tokens.",
                "rollout/truncated",
                zero=True,
            ),
        ),
    ),
    (
        "Confidence and baseline",
        (
            _one("Cov(R, δ)", "Covariance of reward and confidence within groups.", "rcc/cov", smooth=True),
            _one("Baseline shift", "RCC baseline minus mean reward.", "rcc/baseline_shift", smooth=True),
            _one(
                "Gap of δ", "Mean δ of right rollouts minus mean δ of wrong ones.", "delta/gap", smooth=True
            ),
            Panel(
                "δ by side",
                "Mean token log-ratio of policy to reference policy.",
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
        "Optimization",
        (
            _one("Gradient norm", "Before clipping.", "train/grad_norm", smooth=True, zero=True),
            _one(
                "Gradient variance",
                "Estimated from the gradients of groups.",
                "train/gradient_variance",
                smooth=True,
                zero=True,
            ),
            _one(
                "Gradient noise",
                "Gradient variance divided by the squared gradient norm.",
                "train/gradient_noise",
                smooth=True,
                zero=True,
            ),
            _one("Loss", "Not comparable between algorithms.", "train/loss", smooth=True),
            _one(
                "Entropy",
                "Mean entropy of the policy at response tokens, in nats.",
                "train/entropy",
                smooth=True,
            ),
            _one("Learning rate", "At the first optimizer step.", "train/lr", zero=True),
            Panel(
                "KL per token",
                "Estimated by k3.",
                (
                    Line("kl/old_new", "old policy and current policy"),
                    Line("kl/old_ref", "old policy and reference policy", DASHED),
                    Line("kl/rollout_old", "rollout engine and trainer", DOTTED),
                ),
            ),
            _quantiles(
                "Importance ratios",
                "Probability by the trainer over that by the rollout engine, per token, before a correction.",
                "correction/ratio",
            ),
            Panel(
                "Corrected tokens",
                "Share of the tokens whose weight loss.correction bounded or set to 0.",
                (
                    Line("correction/truncated", "truncated"),
                    Line("correction/masked", "masked", DASHED),
                    Line("correction/vetoed", "vetoed", DOTTED),
                ),
                zero=True,
            ),
            _one(
                "Effective sample size", "Of the corrected tokens, as a share.", "correction/ess", zero=True
            ),
        ),
    ),
    (
        "Experts",
        (
            Panel(
                "Largest load of an expert",
                "Over the mean load of its layer's experts; 1 is even.",
                (Line("moe/load/mean", "mean over layers"), Line("moe/load/max", "worst layer", DASHED)),
            ),
            _one("Unused experts", "Share that no response token reached.", "moe/load/unused", zero=True),
            _one("Load balancing", "Before its coefficient; 1 is even.", "moe/load_balancing_loss"),
            _one("z-loss", "Before its coefficient.", "moe/z_loss", zero=True),
        ),
    ),
    (
        "Tokens and time",
        (
            Panel(
                "Tokens trained",
                "Packed with shared prefixes, and as one row per rollout: the gap is saved computation.",
                (Line("tokens/packed", "packed"), Line("tokens/rows", "one row per rollout", DASHED)),
                zero=True,
            ),
            _one("Context tokens", "Tokens of all contexts, headers included.", "tokens/context", zero=True),
            _one(
                "GPU memory", "Most that tensors took on the fullest GPU, in GB.", "memory/peak_gb", zero=True
            ),
            _one("GPU utilization", "FLOPs of the passes over the GPUs' peak.", "perf/mfu", zero=True),
            _one(
                "Rows per second", "Trained rows per GPU and second.", "perf/rows_per_gpu_second", zero=True
            ),
            _one("Seconds per step", "With evaluation, without checkpoints.", "time/step_s", zero=True),
        ),
    ),
)
STAGES = ("rollout", "logprob", "pack", "train", "sync", "eval")


def other_panels(runs: Sequence[Run]) -> list[Panel]:
    """Returns a panel for every metric of the runs that no other chart shows."""
    shown = {line.key for _, panels in SECTIONS for panel in panels for line in panel.lines}
    shown |= {f"time/{stage}_s" for stage in STAGES} | {"step"}
    keys = {key for run in runs for record in run.records for key in record}
    keys -= {f"{key}_stderr" for key in keys}
    by_staleness = {key: match[1] for key in keys if (match := STALENESS.fullmatch(key))}
    single = keys - shown - by_staleness.keys()
    others = [_one(key, "", key) for key in sorted(single) if not key.startswith((HISTOGRAM, LAYERS))]
    for prefix in sorted(set(by_staleness.values())):
        members = [key for key, its in by_staleness.items() if its == prefix]
        caption = "By versions of the weights since the sampling."
        others.append(_numbered(prefix, caption, "staleness", members))
    if layers := [key for key in keys if key.startswith(LAYERS)]:
        others.append(_numbered(LAYERS, "Largest load over the mean.", "layer", layers))
    return others


def _numbered(prefix: str, caption: str, label: str, keys: list[str]) -> Panel:
    """Returns a panel of keys that are the prefix and a number, in the numbers' order."""
    found = sorted(keys, key=lambda key: (len(key), key))
    lines = tuple(Line(key, f"{label} {key.removeprefix(prefix)}") for key in found)
    return Panel(f"{prefix}N", caption, lines)
