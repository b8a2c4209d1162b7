"""Tests make experiment: statistics by enumeration, probes against the reference step, runs after a kill."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.hf_reference import ANSWER, RIGHT, WRONG, Example, reference_loss, response_logp
from support.steps import make_config, perturb
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from experiment import figures, page, probes
from experiment.arms import COMMON, MAIN, VARIANTS, Job, jobs
from experiment.paired import interval, paired
from experiment.runner import DONE, RunError, Runner

from megatron_bicc.errors import UserError


def test_the_permutation_test_enumerates_all_signs() -> None:
    ours = {1: 0.9, 2: 0.7, 3: 0.85, 4: 0.6, 9: 5.0}
    theirs = {1: 0.8, 2: 0.75, 3: 0.6, 4: 0.3}
    difference = np.array([0.1, -0.05, 0.25, 0.3])
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((1, -1), repeat=4)]
    result = paired(ours, theirs)
    assert result.seeds == 4
    assert result.p_permutation == pytest.approx(np.mean(np.array(sums) >= difference.sum() - 1e-12))
    assert result.difference.mean == pytest.approx(0.15)
    # 3.1824 is Student's t of 3 degrees of freedom at 97.5 %
    assert result.difference.half_width == pytest.approx(3.182446 * difference.std(ddof=1) / 2, rel=1e-6)
    assert result.verdict == "no difference shown"


def test_verdicts() -> None:
    higher = paired({i: 1.0 + i / 100 for i in range(8)}, dict.fromkeys(range(8), 0.0))
    assert (higher.verdict, higher.p_permutation) == ("higher", 2 / 2**8)
    lower = paired(dict.fromkeys(range(8), 0.0), {i: 1.0 + i / 100 for i in range(8)})
    assert lower.verdict == "lower"
    same = paired({1: 0.5, 2: 0.6}, {1: 0.5, 2: 0.6})
    assert (same.p_t, same.verdict) == (1.0, "no difference shown")
    with pytest.raises(UserError, match="1 seeds in common"):
        paired({1: 0.5, 2: 0.6}, {2: 0.5, 3: 0.6})
    assert interval([1.0, 3.0]).text == "2 ± 13"


def test_where_a_curve_crosses_the_threshold() -> None:
    steps = np.array([0.0, 3.0, 6.0])
    assert figures.crossing(steps, np.array([0.4, 0.8, 0.9])) == pytest.approx(4.5)
    assert figures.crossing(steps, np.array([0.9, 0.8, 0.9])) == 0
    assert math.isnan(figures.crossing(steps, np.array([0.4, 0.5, 0.6])))


def test_curves_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    nan = float("nan")
    columns = {name: np.array([nan, 0.25, 1e-7]) for name in figures.COLUMNS[2:]}
    curve = figures.Curve("bicc, conditioned", 3, columns)
    figures.write([curve], tmp_path / "runs.csv")
    [back] = figures.read(tmp_path / "runs.csv")
    assert (back.arm, back.seed) == (curve.arm, 3)
    for name, values in columns.items():
        np.testing.assert_array_equal(back.columns[name], values)


def test_every_arm_has_equal_rollouts_and_its_seeds() -> None:
    by_arm: dict[str, set[int]] = {}
    for job in jobs():
        by_arm.setdefault(job.arm.name, set()).add(job.seed)
        assert job.settings()[2 : 2 + len(COMMON)] == COMMON
    assert all(by_arm[arm.name] == set(range(1, 9)) for arm in MAIN)
    assert all(seeds == {1, 2, 3, 4} for name, seeds in by_arm.items() if name not in [a.name for a in MAIN])
    assert len({job.folder for job in jobs()}) == len(jobs())


TRAINER = """
import pathlib, sys
folder = pathlib.Path(sys.argv[-1].removeprefix("output_dir="))
assert not (folder / "half").exists()
(folder / "half").write_text("")
log = folder.parent / "log"
log.write_text((log.read_text() if log.exists() else "") + sys.argv[-2] + chr(10))
sys.exit(3 if (folder.parent / "fail").exists() else 0)
"""
"""Test double for the trainer: notes that it ran, and fails on what another run left"""


def test_a_run_that_is_finished_is_not_run_again(tmp_path: Path) -> None:
    pair = [Job(MAIN[0], seed) for seed in (1, 2)]
    runner = Runner(tmp_path, 1, (sys.executable, "-c", TRAINER))
    fail = tmp_path / "grpo/fail"
    fail.parent.mkdir()
    fail.touch()
    with pytest.raises(RunError, match=r"seed=[12] output_dir=.* ended with status 3; see .*output.txt"):
        runner.run(pair)
    fail.unlink()
    (tmp_path / "grpo/log").unlink()
    runner.run(pair)
    runner.run(pair)
    assert (tmp_path / "grpo/log").read_text() == "seed=1\nseed=2\n"
    done = tmp_path / pair[0].folder / DONE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"settings": ["seed=9"]}))
    with pytest.raises(UserError, match="seed_1: made with other settings; delete it"):
        runner.run(pair)


ESTIMATORS = {
    "grpo": ("grpo", {}),
    "rcc first_order, token_mean": ("grpo+rcc", {}),
    "rcc exact, token_mean": ("grpo+rcc", {"rcc__form": "exact"}),
    "rcc first_order, sequence_sum": ("grpo+rcc", {"rcc__delta": "sequence_sum"}),
    "rcc exact, sequence_sum": ("grpo+rcc", {"rcc__form": "exact", "rcc__delta": "sequence_sum"}),
    "bicc plain": ("grpo+bicc", {}),
    "bicc conditioned": ("grpo+bicc", {"bicc__denominator": "conditioned"}),
}


def test_the_probes_gradients_are_those_of_a_step(model_dirs: dict[str, Path]) -> None:
    path = next(iter(model_dirs.values()))
    start = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = perturb(start)
    rng = np.random.default_rng(2)
    prompt = rng.integers(2, 90, 5).tolist()
    responses = [[*rng.integers(2, 90, n).tolist(), 1] for n in (3, 7, 5, 2)]
    group = probes.Texts(prompt, responses, np.array([True, False, False, True]))
    example = Example(prompt, responses, [1.0, 0.0, 0.0, 1.0], [torch.zeros(len(o)) for o in responses])
    headers = probes.Headers(WRONG, RIGHT, ANSWER)
    gradients = probes._gradients(model, start, group, headers)
    for name, found in zip(probes.ESTIMATORS, gradients, strict=True):
        algorithm, settings = ESTIMATORS[name]
        config = make_config(path, algorithm, **settings)
        config.rollout.temperature = 1.0
        loss = reference_loss(model, model, start, [example], config)
        expected = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected), name


def test_the_reading_probe_reads_each_response_after_its_context(model_dirs: dict[str, Path]) -> None:
    model = probes.load(next(iter(model_dirs.values())))
    groups = [
        probes.Texts([5, 6], [[7, 8, 1], [9, 1]], np.array([True, False])),
        probes.Texts([10], [[11, 1], [12, 13, 1]], np.array([False, True])),
    ]
    found = probes.reading(model, groups, probes.Headers(WRONG, RIGHT, ANSWER))
    with torch.no_grad():
        own = response_logp(model, [5, 6, *WRONG, 9, *ANSWER], [7, 8, 1], 1.0).sum()
        other = response_logp(model, [10, *WRONG, 11, *ANSWER], [12, 13, 1], 1.0).sum()
        crossed = response_logp(model, [5, 6, *WRONG, 11, *ANSWER], [7, 8, 1], 1.0).sum()
        back = response_logp(model, [10, *WRONG, 9, *ANSWER], [12, 13, 1], 1.0).sum()
    assert found["own"]["right"] == pytest.approx(float(own + other) / 2, rel=1e-5)
    assert found["shuffled"]["right"] == pytest.approx(float(crossed + back) / 2, rel=1e-5)


def test_inner_products_of_expectations_are_unbiased() -> None:
    a, b = (
        torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]]),
        torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 4.0]]),
    )
    pairs = [float(a[i] @ b[j]) for i in range(3) for j in range(3) if i != j]
    assert probes._between(a, b) == pytest.approx(np.mean(pairs), rel=1e-6)


def synthetic_results(folder: Path) -> None:
    """What collect_figures would write: pass@1 rises by seed and step, faster where no context is trained."""
    folder.mkdir(parents=True)
    curves = []
    for job in (job for job in jobs() if job.arm in (*MAIN, *VARIANTS)):
        columns = {name: np.linspace(0.1, 0.2, 25) * job.seed for name in figures.COLUMNS[2:]}
        columns["step"], columns["tokens"] = np.arange(25.0), np.arange(25.0) * 100
        columns["pass_at_1"] = np.where(columns["step"] % 3 == 0, 0.5 + columns["step"] / 60, np.nan)
        columns["pass_at_1"] += job.seed / 100 + ("bicc" not in job.arm.name) * 0.02 * (1 + job.seed % 2)
        curves.append(figures.Curve(job.arm.name, job.seed, columns))
    figures.write(curves, folder / page.RAW)
    (folder / page.ORIGIN).write_text(json.dumps({"commits": ["abc123"], "settings": []}))
    kinds = {k: dict.fromkeys(("right", "wrong", "margin"), 0.5) for k in probes.CONTEXTS}
    estimates = {k: dict.fromkeys(("variance", "relative", "cosine"), 2.0) for k in probes.ESTIMATORS}
    probed = {"reading": {"start": [kinds]}, "estimators": {"start": [estimates] * 4}}
    (folder / page.PROBES).write_text(json.dumps(probed))


def test_the_page_is_made_of_the_raw_figures_alone(tmp_path: Path) -> None:
    synthetic_results(tmp_path / "results")
    (tmp_path / "results" / page.DISCUSSION).write_text("abc123\nWhat was seen.\n")
    text = page.write_page(tmp_path).read_text()
    assert "at commit abc123" in text and "What was seen." in text
    for arm in (*MAIN, *VARIANTS):
        assert f"| {arm.name} | {arm.seeds} |" in text
    # eight differences of -0.02 or -0.04
    assert "| bicc | grpo | 8 | -0.0300 ± 0.0089, p < 0.001 (0.008): lower |" in text
    for name in ("pass_at_1", "variants", "gradients"):
        assert f"(results/{name}.svg)" in text
        assert (tmp_path / f"results/{name}.svg").stat().st_size > 10_000
    (tmp_path / "results" / page.DISCUSSION).write_text("def456\nOf other runs.\n")
    assert "Of other runs." not in page.write_page(tmp_path).read_text()
