"""report.html: one or several runs on one page that needs no network."""

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_bicc.monitoring import charts, summary
from megatron_bicc.monitoring.charts import Drawing
from megatron_bicc.monitoring.group_browser import browser_groups, printable
from megatron_bicc.monitoring.layout_bars import BANDS, step_layouts
from megatron_bicc.monitoring.panels import SECTIONS, other_panels
from megatron_bicc.monitoring.runs import Run, read_groups, read_layouts, read_run

REPORT_FILE = "report.html"
# (class, meaning, top, height) of the parts of a bar
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
    """Charts under one heading."""

    title: str
    drawings: list[Drawing]


def write_report(run_dirs: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Writes the page of the runs, the first one's story first, and returns its path.

    path: by default report.html in the first run's directory, which is replaced.
    Raises ValueError that names the file: one of a run's is missing or broken, or the page cannot be written.
    """
    runs = _distinct([read_run(run_dir) for run_dir in run_dirs])
    page = _render(
        runs=runs,
        title=" against ".join(run.name for run in runs),
        sentences=summary.sentences(runs),
        facts=summary.facts(runs[0]) if len(runs) == 1 else [],
        fact_table=summary.fact_table(runs),
        settings=summary.differing_settings(runs),
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
    draft = path.with_suffix(".new")
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot write it: {error.strerror}") from None
    return path


def _distinct(runs: list[Run]) -> list[Run]:
    """The runs, those numbered whose directories are called alike."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({i})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs, 1)
    ]


def _sections(runs: Sequence[Run]) -> list[Section]:
    """The charts that find something to draw."""
    drawn = {title: [charts.draw_panel(panel, runs) for panel in panels] for title, panels in SECTIONS}
    drawn["Groups and responses"].insert(1, charts.draw_histogram(runs))
    drawn["Tokens and time"].append(charts.draw_stages(runs))
    drawn["Other metrics"] = [charts.draw_panel(panel, runs) for panel in other_panels(runs)]
    sections = [Section(title, list(filter(None, drawings))) for title, drawings in drawn.items()]
    return [section for section in sections if section.drawings]


def _render(**values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_bicc.monitoring", "."),
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
    return resources.files("megatron_bicc.monitoring").joinpath(name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
