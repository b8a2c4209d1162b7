"""Tests the report's summary: progress, comparisons, and differing settings."""

from megatron_bicc.report.page import differing_settings, sentences
from megatron_bicc.report.runs import Run


def scored(name: str, scores: dict[int, float], error: float = 0.01, **last: float) -> Run:
    records = [
        {"step": step, "eval/pass_at_1": score, "eval/pass_at_1_stderr": error, **last}
        for step, score in scores.items()
    ]
    return Run(name, records, {"algorithm": name})


def test_the_summary_says_what_happened():
    far, near = scored("far", {0: 0.5, 4: 0.9}), scored("near", {0: 0.5, 4: 0.5, 8: 0.95})
    assert sentences([far, near]) == [
        "far trained 4 steps with algorithm far; held-out pass@1 rose from 0.500 to 0.900.",
        "near trained 8 steps with algorithm near; held-out pass@1 rose from 0.500 to 0.950.",
        "far was ahead of near by 0.400 in held-out pass@1 at step 4, the last that both evaluated; that is "
        "more than twice the standard error of the difference, 0.014, which covers the sampling of the "
        "evaluation only, not the variation between seeds.",
    ]
    close = scored("close", {4: 0.92}, error=0.02)
    assert "close was ahead of far by 0.020" in sentences([far, close])[-1]
    assert "that is not more than twice" in sentences([far, close])[-1]
    ill = scored(
        "ill", {0: 0.5, 1: 0.4}, **{"contrast/share": 0.1, "rollout/truncated": 0.5, "train/loss": None}
    )
    assert [said.removeprefix("ill: ") for said in sentences([ill])[1:]] == [
        "only 10% of the last step's groups had both right and wrong rollouts; the others contributed no "
        "gradient.",
        "50% of the last step's responses were cut at rollout.max_new_tokens.",
        "train/loss was not finite at step 0.",
    ]
    assert "fell from 0.500 to 0.400" in sentences([ill])[0]


def test_settings_that_differ():
    runs = [
        Run("a", [], {"output_dir": "x", "seed": 1, "bicc.weight": 1.0}),
        Run("b", [], {"output_dir": "y", "seed": 1, "bicc.weight": 0.5, "new": None}),
        Run("c", []),
    ]
    assert differing_settings(runs) == [
        ["setting", "a", "b", "c"],
        ["bicc.weight", "1.0", "0.5", "not recorded"],
    ]
    assert differing_settings(runs[::2]) == []
