"""Writes docs/results.md from docs/results: the raw figures of every run, the probes, and their origin."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import jinja2

from experiment import arms, figures, pictures, probes
from experiment.arms import HALFWAY, MAIN, VARIANTS, Arm, Job
from experiment.figures import Curve
from experiment.paired import Paired, interval, paired
from experiment.runner import DONE, REPOSITORY, is_finished
from megatron_bicc import device

RAW, ORIGIN, PROBES, DISCUSSION = "runs.csv", "origin.json", "probes.json", "discussion.md"
READERS = ("grpo", "bicc", "bicc, conditioned", "bicc+rcc, weight 0.5")
"""Arms whose trained policies the first probe examines"""
PROBE_SEEDS = (1, 2, 3, 4)
READ_GROUPS = 40
START, HELD_OUT = REPOSITORY / "examples/tiny_policy", REPOSITORY / "examples/data/heldout.parquet"
MEASURES = {
    "final": "pass@1 at the last step",
    "area": "mean pass@1 of the evaluations after step 0",
    "tokens": "training tokens",
    "early_variance": "gradient variance, steps 1 to 8",
    "early_noise": "gradient noise, steps 1 to 8",
}


def collect_figures(out: Path, folder: Path) -> None:
    """Writes all data of the page into `folder`, from the finished runs in `out`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures.write(figures.collect(out), folder / RAW)
    finished = [job for job in arms.jobs() if is_finished(out, job)]
    commits = {json.loads((out / job.folder / DONE).read_text())["commit"] for job in finished}
    origin = {"commits": sorted(commits), "settings": list(arms.COMMON)}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n")
    (folder / PROBES).write_text(json.dumps(_probed(out), indent=1) + "\n")


def _probed(out: Path) -> dict[str, Any]:
    """Returns both probes of the finished runs; they take minutes, so the result is kept in `out`."""
    probed_jobs = [job for job in arms.jobs() if job.seed in PROBE_SEEDS and is_finished(out, job)]
    policies = [job.folder for job in probed_jobs if job.arm.name in (*READERS, HALFWAY.name)]
    kept = out / PROBES
    if kept.exists() and json.loads(kept.read_text())["policies"] == policies:
        return json.loads(kept.read_text())
    device.start_distributed()
    probed = {"policies": policies, "reading": _readings(out), "estimators": _estimators(out)}
    device.end_distributed()
    kept.write_text(json.dumps(probed) + "\n")
    return probed


def _readings(out: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Returns probes.reading by policy and seed, all on the same texts of the initial policy."""
    groups, headers = probes.draw_groups(START, HELD_OUT, seed=1)
    groups = groups[:READ_GROUPS]
    found = {"start": [probes.reading(probes.load(START), groups, headers)]}
    by_name = {arm.name: arm for arm in (*MAIN, *VARIANTS)}
    for name in READERS:
        jobs = [Job(by_name[name], seed) for seed in PROBE_SEEDS]
        policies = [out / job.folder / "hf" for job in jobs if is_finished(out, job)]
        found[name] = [probes.reading(probes.load(policy), groups, headers) for policy in policies]
    return found


def _estimators(out: Path) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Returns probes.estimators of the initial and half-trained policies on their rollouts, by seed."""
    start = probes.load(START)
    found: dict[str, list[dict[str, dict[str, float]]]] = {"start": [], "halfway": []}
    for seed in PROBE_SEEDS:
        for name, policy in (("start", START), ("halfway", out / Job(HALFWAY, seed).folder / "hf")):
            groups, headers = probes.draw_groups(policy, HELD_OUT, seed)
            found[name].append(probes.estimators(probes.load(policy), start, groups, headers))
    return found


def write_page(docs: Path) -> Path:
    """Draws the pictures and writes results.md from the data of collect_figures."""
    folder = docs / "results"
    curves = figures.read(folder / RAW)
    pictures.draw_all(curves, folder)
    origin = json.loads((folder / ORIGIN).read_text())
    probed = json.loads((folder / PROBES).read_text())
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("results.md.j2").render(
        origin=origin,
        command=_command(),
        steps=arms.STEPS,
        threshold=figures.THRESHOLD,
        arms=_arm_rows(curves),
        tests=_test_rows(curves),
        measures=MEASURES,
        reading=_reading_rows(probed["reading"]),
        estimators=_estimator_rows(probed["estimators"]),
        discussion=_discussion(folder, origin["commits"]),
        seeds=len(PROBE_SEEDS),
    )
    (docs / "results.md").write_text(text.strip() + "\n")
    return docs / "results.md"


def _command() -> str:
    return shlex.join(["python", "-m", "megatron_bicc.train", *Job(MAIN[0], 1).settings()])


def _arm_rows(curves: list[Curve]) -> list[dict[str, str]]:
    rows = []
    for arm in (*MAIN, *VARIANTS):
        of_arm = [figures.summary(curve) for curve in curves if curve.arm == arm.name]
        if not of_arm:
            continue
        rows.append({"name": arm.name, "seeds": str(len(of_arm))} | _texts(of_arm))
    return rows


def _texts(summaries: list[dict[str, float]]) -> dict[str, str]:
    texts = {}
    for name in summaries[0]:
        finite = [s[name] for s in summaries if math.isfinite(s[name])]
        missing = len(summaries) - len(finite)
        text = interval(finite).text if len(finite) > 1 else "-"
        texts[name] = f"{text} ({missing} never)" if missing and name.endswith("_to") else text
    return texts


def _test_rows(curves: list[Curve]) -> list[dict[str, str | dict[str, Paired]]]:
    by_arm: dict[str, dict[int, dict[str, float]]] = {}
    for curve in curves:
        by_arm.setdefault(curve.arm, {})[curve.seed] = figures.summary(curve)
    pairs = [(arm, arm.against) for arm in MAIN[1:]] + [(MAIN[3], "bicc"), (MAIN[3], "grpo+rcc")]
    pairs += [(arm, arm.against) for arm in VARIANTS]
    pairs += [(arm, "bicc, conditioned") for arm in VARIANTS if arm.name == "bicc+rcc, conditioned"]
    pairs += [(arm, "grpo") for arm in VARIANTS if arm.name == "bicc+rcc, weight 0.5"]
    pairs = [(arm, against) for arm, against in pairs if len(by_arm.get(arm.name, {})) > 1]
    return [_tests(arm, against, by_arm) for arm, against in pairs]


def _tests(
    arm: Arm, against: str, by_arm: dict[str, dict[int, dict[str, float]]]
) -> dict[str, str | dict[str, Paired]]:
    def of(name: str, measure: str) -> dict[int, float]:
        return {seed: s[measure] for seed, s in by_arm[name].items() if math.isfinite(s[measure])}

    results = {measure: paired(of(arm.name, measure), of(against, measure)) for measure in MEASURES}
    return {"name": arm.name, "against": against, "results": results}


def _reading_rows(reading: dict[str, list[dict[str, dict[str, float]]]]) -> list[dict[str, str]]:
    rows = []
    for policy, by_seed in reading.items():
        row = {"policy": policy}
        for kind in probes.CONTEXTS:
            for value in ("right", "wrong", "margin"):
                values = [seed[kind][value] for seed in by_seed]
                row[f"{kind}_{value}"] = interval(values).text if len(values) > 1 else f"{values[0]:.3f}"
        rows.append(row)
    return rows


def _estimator_rows(by_policy: dict[str, list[dict[str, dict[str, float]]]]) -> list[dict[str, str]]:
    """Returns a table row per estimator: its variance relative to GRPO's on the same rollouts, over seeds."""
    rows = []
    for policy, by_seed in by_policy.items():
        for name in probes.ESTIMATORS:
            ratios = {
                key: [seed[name][key] / seed["grpo"][key] for seed in by_seed]
                for key in ("variance", "relative")
            }
            cosines = [seed[name]["cosine"] for seed in by_seed]
            row = {key: interval(values).text for key, values in ratios.items()}
            rows.append({"policy": policy, "name": name, "cosine": interval(cosines).text} | row)
    return rows


def _discussion(folder: Path, commits: list[str]) -> str:
    """Returns the hand-written discussion if its first line names the commits of these runs; else nothing."""
    path = folder / DISCUSSION
    if not path.exists():
        return ""
    about, _, text = path.read_text().partition("\n")
    return text.strip() if about.strip() == " ".join(commits) else ""
