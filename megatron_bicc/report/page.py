"""Writes report.html: one or several runs on one page that needs no network.

The page begins with a summary computed from the metrics, in numbers and sentences, followed by the differing
settings, the charts, the packed layouts and the groups.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_bicc.errors import UserError
from megatron_bicc.files import atomic_file
from megatron_bicc.report import charts
from megatron_bicc.report.charts import Drawing
from megatron_bicc.report.groups import BANDS, browser_groups, printable, step_layouts
from megatron_bicc.report.panels import SECTIONS, other_panels
from megatron_bicc.report.runs import Run, read_groups, read_layouts, read_run


@dataclass(frozen=True)
class Fact:
    """A number of the summary, with its label."""

    label: str
    value: str
    remark: str = ""


def facts(run: Run) -> list[Fact]:
    """Returns the numbers at the top of the page; metrics that were not recorded are left out."""
    found = []
    if scores := run.values("eval/pass_at_1"):
        error = run.values("eval/pass_at_1_stderr")
        spread = f"± {error[-1]:.3f}, " if error else ""
        remark = f"{spread}from {scores[0]:.3f}, best {max(scores):.3f}"
        found.append(Fact("held-out pass@1", f"{scores[-1]:.3f}", remark))
    if rewards := run.values("reward/mean"):
        found.append(Fact("mean reward", f"{rewards[-1]:.3f}", f"from {rewards[0]:.3f}"))
    packed, rows = sum(run.values("tokens/packed")), sum(run.values("tokens/rows"))
    if packed and rows:
        remark = f"{packed:,.0f} instead of {rows:,.0f}"
        found.append(Fact("tokens trained", f"{rows / packed:.2f}× fewer", remark))
    if seconds := run.values("time/step_s"):
        remark = f"{len(seconds)} steps, {sum(seconds) / len(seconds):.1f} s each"
        found.append(Fact("time", duration(sum(seconds)), remark))
    return found


def fact_table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the facts of several runs as a table: a header of run names, then one row per number."""
    found = [{fact.label: fact for fact in facts(run)} for run in runs]
    labels = dict.fromkeys(label for each in found for label in each)
    rows = [[label, *(_cell(each.get(label)) for each in found)] for label in labels]
    return [["", *(run.name for run in runs)], *rows]


def sentences(runs: Sequence[Run]) -> list[str]:
    """Returns the summary: each run's progress, warnings, and comparisons on held-out prompts."""
    found = []
    for run in runs:
        found += [_story(run), *_warnings(run)]
    found += [_comparison(runs[0], other) for other in runs[1:]]
    return [sentence for sentence in found if sentence]


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a table of the settings that differ between runs that recorded them; a header of names first.

    Empty if none differs.
    """
    recorded = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in recorded for name in settings)
    rows = [
        [name, *(_value(run, name) for run in runs)]
        for name in names
        if name != "output_dir" and len({repr(settings.get(name)) for settings in recorded}) > 1
    ]
    return [["setting", *(run.name for run in runs)], *rows] if rows else []


def duration(seconds: float) -> str:
    """Formats a duration in hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _cell(fact: Fact | None) -> str:
    return f"{fact.value} ({fact.remark})" if fact else "–"


def _value(run: Run, name: str) -> str:
    if not run.settings:
        return "not recorded"
    value = run.settings.get(name)
    return "–" if value is None else str(value)


def _story(run: Run) -> str:
    steps = max((record["step"] for record in run.records), default=0)
    if not steps:
        return f"{run.name}: no step finished yet."
    with_what = f" with algorithm {run.settings['algorithm']}" if "algorithm" in run.settings else ""
    trained = f"{run.name} trained {steps} step{'s' if steps > 1 else ''}{with_what}"
    scores = run.values("eval/pass_at_1")
    if len(scores) < 2:
        return f"{trained}; held-out pass@1 was evaluated fewer than two times."
    verb = "rose" if scores[-1] > scores[0] else "fell" if scores[-1] < scores[0] else "stayed"
    ends = f"at {scores[0]:.3f}" if verb == "stayed" else f"from {scores[0]:.3f} to {scores[-1]:.3f}"
    return f"{trained}; held-out pass@1 {verb} {ends}."


def _warnings(run: Run) -> list[str]:
    last = {key: run.values(key)[-1:] or [math.nan] for key in ("contrast/share", "rollout/truncated")}
    warnings = []
    if last["contrast/share"][0] < 0.25:
        warnings.append(
            f"{run.name}: only {last['contrast/share'][0]:.0%} of the last step's groups had both right and "
            "wrong rollouts; the others contributed no gradient."
        )
    if last["rollout/truncated"][0] > 0.1:
        warnings.append(
            f"{run.name}: {last['rollout/truncated'][0]:.0%} of the last step's responses were cut at "
            "rollout.max_new_tokens."
        )
    broken = {key: r["step"] for r in reversed(run.records) for key, value in r.items() if value is None}
    warnings += [f"{run.name}: {key} was not finite at step {step}." for key, step in broken.items()]
    return warnings


def _comparison(first: Run, other: Run) -> str:
    """Compares pass@1 at the last step at which both were evaluated, with its standard error."""
    ours, theirs = (dict(zip(*run.series("eval/pass_at_1"), strict=True)) for run in (first, other))
    common = [
        s for s in ours if s > 0 and s in theirs and math.isfinite(ours[s]) and math.isfinite(theirs[s])
    ]
    if not common:
        return f"{first.name} and {other.name} were not evaluated at a common step after the first."
    step = max(common)
    gap = ours[step] - theirs[step]
    errors = [dict(zip(*r.series("eval/pass_at_1_stderr"), strict=True)).get(step) for r in (first, other)]
    where = f"at step {step}, the last that both evaluated"
    if gap == 0:
        return f"{first.name} and {other.name} had the same held-out pass@1 {where}."
    ahead, behind = (first, other) if gap > 0 else (other, first)
    said = f"{ahead.name} was ahead of {behind.name} by {abs(gap):.3f} in held-out pass@1 {where}"
    if any(error is None or math.isnan(error) for error in errors):
        return f"{said}."
    error = math.hypot(*errors)
    verdict = "more" if abs(gap) > 2 * error else "not more"
    return (
        f"{said}; that is {verdict} than twice the standard error of the difference, {error:.3f}, "
        "which covers the sampling of the evaluation only, not the variation between seeds."
    )


REPORT_FILE = "report.html"
# (CSS class, label, top, height) of each part of a bar
LAYOUT_KEY = [
    *(
        (f"{part} {band}", f"{band} side's {part}", *BANDS[band])
        for band in ("right", "wrong")
        for part in ("prefix", "responses")
    ),
    ("prefix both", "prefix of both sides", *BANDS["both"]),
    ("padding", "padding", *BANDS["both"]),
]


@dataclass(frozen=True)
class Section:
    """A heading with its charts."""

    title: str
    drawings: list[Drawing]


def write_report(run_dirs: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Writes the page of the runs, in this order, and returns its path.

    path: by default report.html in the first run's directory; an existing file is replaced. Raises UserError,
    with the file, if a file of a run is missing or broken, or the page cannot be written.
    """
    runs = _distinct([read_run(run_dir) for run_dir in run_dirs])
    page = _render(
        runs=runs,
        title=" against ".join(run.name for run in runs),
        sentences=sentences(runs),
        facts=facts(runs[0]) if len(runs) == 1 else [],
        fact_table=fact_table(runs),
        settings=differing_settings(runs),
        sections=_sections(runs),
        layout_key=LAYOUT_KEY,
        layouts=[
            each
            for run, run_dir in zip(runs, run_dirs, strict=True)
            for each in step_layouts(run, read_layouts(run_dir))
        ],
        browser=browser_groups([read_groups(run_dir) for run_dir in run_dirs])
        | {"runs": [printable(run.name) for run in runs]},
    )
    path = Path(path or Path(run_dirs[0]) / REPORT_FILE)
    try:
        with atomic_file(path) as draft:
            draft.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _distinct(runs: list[Run]) -> list[Run]:
    """Returns the runs; names that occur more than once get a number."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({i})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs, 1)
    ]


def _sections(runs: Sequence[Run]) -> list[Section]:
    """Returns the sections with their charts; a chart without recorded metrics is left out."""
    drawn = {title: [charts.draw_panel(panel, runs) for panel in panels] for title, panels in SECTIONS}
    drawn["Groups and responses"].insert(1, charts.draw_histogram(runs))
    drawn["Tokens and time"].append(charts.draw_stages(runs))
    drawn["Other metrics"] = [charts.draw_panel(panel, runs) for panel in other_panels(runs)]
    sections = [Section(title, list(filter(None, drawings))) for title, drawings in drawn.items()]
    return [section for section in sections if section.drawings]


def _render(**values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_bicc.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    style, script = _own_text("report.css"), _own_text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.j2")
    return template.render(style=Markup(style), script=Markup(script), script_sha256=digest, **values)


def _own_text(name: str) -> str:
    return resources.files("megatron_bicc.report").joinpath(name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
