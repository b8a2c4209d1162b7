"""Tests the chart of a packed step, from the packer's micro-batches to the bars of the page."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from packing.cases import (
    Group,
    Rollout,
    group_lists,
    make_batch,
    make_settings,
    micro_batches,
    pack_every_rank,
)
from support.runs import layout

from megatron_bicc.config import Config, TrainConfig
from megatron_bicc.packing.types import PackingSettings, packed_sides
from megatron_bicc.report.groups import BARS_SHOWN, STEPS_SHOWN, Bar, step_layouts
from megatron_bicc.report.runs import Run
from megatron_bicc.training.step_metrics import report_layout


@given(group_lists)
def test_sides_are_the_rows_of_the_micro_batch(groups: list[Group]):
    settings = make_settings(max_tokens_per_microbatch=60, alignment=4, overlong="drop")
    batch = make_batch(groups)
    for micro_batch in micro_batches(pack_every_rank(batch, settings, dp_size=2)):
        sides = packed_sides(micro_batch)
        lengths = [side.prefix_rows for side in sides]
        lengths += [rows for side in sides for rows in side.response_rows]
        ends = np.cumsum([0, *lengths])
        assert micro_batch.cu_seqlens[: len(ends)].tolist() == ends.tolist()
        assert [r for side in sides for r in side.rollouts] == micro_batch.rollout_S.tolist()
        assert [side.group for side in sides for _ in side.rollouts] == micro_batch.group_S.tolist()
        for side in sides:
            # no side mixes right and wrong, and its responses have their own length
            assert len(set(batch.rewards_R[list(side.rollouts)])) == 1
            assert np.diff(batch.offsets_R)[list(side.rollouts)].tolist() == list(side.response_rows)


def packed_step(settings: PackingSettings, dp_size: int) -> tuple[SimpleNamespace, Config]:
    groups = [
        Group(prompt=5, rollouts=[Rollout(7, True), Rollout(9, False), Rollout(4, True), Rollout(3, False)])
        for _ in range(6)
    ]
    batch = make_batch(groups)
    trained = [SimpleNamespace(layout=settings.layout, plan=pack_every_rank(batch, settings, dp_size))]
    config = Config(train=TrainConfig(max_tokens_per_microbatch=settings.max_tokens_per_microbatch))
    return SimpleNamespace(batch=SimpleNamespace(rollouts=batch), trained=trained), config


def widths(bar: Bar) -> dict[str, float]:
    """Units that each kind of row takes in the bar, from the first of its pieces to the end of the last."""
    paths: dict[str, str] = {"padding": bar.padding_path, "prefix": "", "right": "", "wrong": ""}
    for part in bar.parts:
        paths["prefix"] += part.prefix_path
        for label, path in part.responses:
            paths[label] += path
    return {kind: sum(map(float, re.findall(r"h([\d.]+)v", path))) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", ["bilateral", "plain"])
def test_bars_are_to_scale(kind: str):
    settings = make_settings(layout=kind, max_tokens_per_microbatch=200, alignment=16)
    result, config = packed_step(settings, dp_size=2)
    record = {"step": 3, **report_layout(result, config)}
    (shown,) = step_layouts(Run("a", []), [record])
    plan = result.trained[0].plan
    assert shown.name == f"a, step 3, {'with context' if kind == 'bilateral' else 'prompt alone'}"
    assert len(shown.bars) == len(micro_batches(plan))
    for bar, micro_batch in zip(shown.bars, micro_batches(plan), strict=True):
        unit = 1000 / 200
        found = widths(bar)
        assert bar.budget_x == 1000
        assert found["prefix"] == pytest.approx(micro_batch.num_prefix_rows * unit, abs=1.3 * len(bar.parts))
        responses = found["right"] + found["wrong"]
        assert responses == pytest.approx(
            micro_batch.num_response_rows * unit, abs=1.3 * len(micro_batch.rollout_S)
        )
        right_rows = int(
            (
                result.batch.rollouts.rewards_R[
                    np.searchsorted(result.batch.rollouts.offsets_R, micro_batch.gather_A, side="right") - 1
                ]
                > 0.5
            ).sum()
        )
        assert f", {right_rows} right, {micro_batch.num_response_rows - right_rows} wrong, " in bar.caption
        assert found["padding"] == pytest.approx(
            (len(micro_batch.tokens_N) - micro_batch.num_prefix_rows - micro_batch.num_response_rows) * unit,
            abs=1.3,
        )
        assert f": {len(micro_batch.tokens_N):,} of 200 rows" in bar.caption


def test_responses_follow_all_prefixes_and_sides_keep_their_colour():
    (shown,) = step_layouts(Run("a", []), [{"step": 1, **layout()}])
    right, wrong = (bar.parts[0] for bar in shown.bars)
    assert right.prefix_class == "prefix right" and wrong.prefix_class == "prefix wrong"
    assert right.prefix_path.startswith("M0.0 0h") and wrong.prefix_path.startswith("M0.0 5h")
    assert [label for label, _ in right.responses] == ["right"]
    assert re.findall(r"M([\d.]+) ", wrong.responses[0][1]) == ["400.0", "500.0", "600.0"]
    assert wrong.title == "group 1, wrong: prefix of 40 rows, 3 responses of 31 rows"


def test_a_long_run_and_a_large_step_stay_small():
    micro_batch = layout()["plans"][0]["ranks"][0][0]
    large = {"budget": 100, "plans": [{"context": True, "ranks": [[micro_batch] * 30]}]}
    shown = step_layouts(Run("a", []), [{"step": step, **large} for step in range(1, 101)])
    assert len(shown) == STEPS_SHOWN
    assert (shown[0].name, shown[-1].name) == ("a, step 1, with context", "a, step 100, with context")
    assert len(shown[0].bars) == BARS_SHOWN and shown[0].bars_left_out == 30 - BARS_SHOWN
