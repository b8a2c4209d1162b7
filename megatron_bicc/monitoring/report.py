"""report.html: a run on one page that needs no network."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_bicc.monitoring import charts
from megatron_bicc.monitoring.runs import Run, read_groups, read_run

REPORT_FILE = "report.html"
PANELS: tuple[tuple[str, str, charts.Chart], ...] = (
    ("Reward", "Mean over the rollouts of a step.", charts.reward),
    ("pass@1", "Held-out prompts, sampled, no context.", charts.pass_at_1),
    (
        "Cov(R, δ)",
        "Reward and confidence, within groups; RCC moves the baseline by twice this.",
        charts.covariance,
    ),
    ("Tokens trained", "Packed with shared prefixes, against one row a rollout.", charts.tokens),
    ("Gradient norm", "Before clipping.", charts.gradient_norm),
    ("Seconds a step", "By stage.", charts.step_time),
)
# Control characters, those that reorder the text around them, and lone surrogates that no encoding takes.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Side:
    """The right or the wrong rollouts of a group, as the page shows them."""

    label: str
    rollouts: list[dict[str, Any]]
    shared_context: str | None
    """The context that all of them were trained under; None if they differ."""


def write_report(run_dir: str | Path, compare_dir: str | Path | None = None, max_groups: int = 6) -> Path:
    """Writes report.html into run_dir and returns its path.

    compare_dir: a run whose curves are drawn beside. max_groups: groups shown rollout by rollout.
    Raises ValueError that names the file if metrics.jsonl of either run is missing or broken.
    """
    runs = [read_run(path) for path in (run_dir, compare_dir) if path]
    page = _template().render(
        run=runs[0],
        compared=runs[1] if compare_dir else None,
        tiles=_tiles(runs),
        panels=[(title, caption, _figure(chart, runs)) for title, caption, chart in PANELS],
        groups=[_present(group) for group in _spread(read_groups(run_dir), max_groups)],
    )
    path = Path(run_dir) / REPORT_FILE
    draft = path.with_suffix(".new")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_bicc.monitoring", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _printable(value),
    )
    return environment.get_template("report.html.j2")


def _printable(value: Any) -> Any:
    return _UNPRINTABLE.sub("�", value) if isinstance(value, str) else value


def _figure(chart: charts.Chart, runs: Sequence[Run]) -> Markup | None:
    drawing = charts.svg(chart, runs)
    return Markup(drawing) if drawing else None


def _tiles(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers at the top; a number that was not recorded has no tile."""
    run, tiles = runs[0], []
    for label, key in (("pass@1", "eval/pass_at_1"), ("mean reward", "reward/mean")):
        ends = [(values[0], values[-1]) for r in runs if (values := r.values(key))]
        if ends and run.values(key):
            first, last = ends[0]
            other = f"; {runs[1].name} {ends[1][1]:.3f}" if len(ends) > 1 else ""
            tiles.append((label, f"{last:.3f}", f"from {first:.3f}{other}"))
    packed, rows = sum(run.values("tokens/packed")), sum(run.values("tokens/rows"))
    if packed and rows:
        remark = f"{packed:,.0f} instead of {rows:,.0f}"
        tiles.append(("tokens trained", f"{rows / packed:.2f}× fewer", remark))
    if seconds := run.values("time/step_s"):
        remark = f"{len(seconds)} steps, {sum(seconds) / len(seconds):.1f} s each"
        tiles.append(("time", _duration(sum(seconds)), remark))
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _spread(groups: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` groups with both right and wrong rollouts, evenly over the run, from end to end."""
    mixed = [g for g in groups if len({bool(rollout["correct"]) for rollout in g["rollouts"]}) == 2]
    if len(mixed) <= count:
        return mixed
    return [mixed[round(i * (len(mixed) - 1) / max(count - 1, 1))] for i in range(count)]


def _present(group: dict[str, Any]) -> dict[str, Any]:
    sides = []
    for label, correct in (("right", True), ("wrong", False)):
        rollouts = [rollout for rollout in group["rollouts"] if bool(rollout["correct"]) is correct]
        contexts = {rollout["context"] for rollout in rollouts}
        sides.append(Side(label, rollouts, contexts.pop() if len(contexts) == 1 else None))
    return {"step": group["step"], "prompt": group["prompt"], "truth": group["ground_truth"], "sides": sides}
