"""Tests the CUDA kernels' arithmetic, compiled for the host, without a GPU. tests/gpu runs the kernels.

Shape suffixes: T response rows.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from packing.cases import Group, Rollout, make_batch, make_settings, micro_batches, pack_every_rank
from support.token_loss import ESTIMATORS, OBJECTIVES, clip_masks, loss_config, loss_in_torch, loss_inputs

from megatron_bicc import _C
from megatron_bicc.algorithms.policy_loss import clip_bounds
from megatron_bicc.config import LossConfig

REPOSITORY = Path(__file__).parents[2]


class FillArrays(ctypes.Structure):
    """csrc/cuda/copy_token.h"""

    _fields_ = (
        [(f"source_{i}", ctypes.c_void_p) for i in range(3)]
        + [
            ("features", ctypes.c_void_p),
            ("feature_count", ctypes.c_int64),
            ("response_tokens", ctypes.c_int64),
        ]
        + [(name, ctypes.c_void_p) for name in ("tokens", "positions", "labels", "gather", "features_out")]
    )


class LossSettings(ctypes.Structure):
    """csrc/cuda/token_loss_math.h"""

    _fields_ = (
        [("objective", ctypes.c_int)]
        + [(name, ctypes.c_float) for name in ("low", "high", "dual", "tis_cap", "kl_coefficient")]
        + [("kl_estimator", ctypes.c_int)]
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_host") / "host.so"
    source = Path(__file__).with_name("cuda_on_host.cpp")
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        f"-I{REPOSITORY / 'csrc'}",
        source,
        "-o",
        library,
    ]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.response_loss.restype = ctypes.c_double
    return loaded


def address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("keep", ["head", "both_ends"])
@pytest.mark.parametrize("dp_size", [1, 3])
def test_the_copies_of_a_plan_make_the_packed_rows(host, keep, dp_size):
    random = np.random.default_rng(0)
    groups = [
        Group(int(random.integers(1, 5)), [Rollout(int(n), bool(n % 2), n % 3 == 0) for n in lengths])
        for lengths in random.integers(1, 30, (20, 5))
    ]
    batch = make_batch(groups)
    settings = make_settings(max_sequence_tokens=60, max_tokens_per_microbatch=128, alignment=16, keep=keep)
    features_FT = random.random((2, len(batch.tokens)), dtype=np.float32)
    expected = pack_every_rank(batch, settings, dp_size, features_FT=features_FT)
    plan = _C.Plan(batch, settings, dp_size)
    rows, response_rows = (int(total) for total in plan.sizes.sum(0)[[0, 2]])
    out = {name: np.full(rows, -9, np.int32) for name in ("tokens", "positions", "labels")}
    out |= {"gather": np.full(response_rows, -9), "features_out": np.full(2 * response_rows, -9, np.float32)}
    sources = [batch.prompt_tokens, batch.tokens, plan.headers]
    arrays = FillArrays(
        *map(address, [*sources, features_FT]), 2, len(batch.tokens), *map(address, out.values())
    )
    copies = plan.copies
    host.run_copies(address(copies), ctypes.c_int64(len(copies)), ctypes.byref(arrays))
    done = micro_batches(expected)
    for name, field in (("tokens", "tokens_N"), ("positions", "positions_N"), ("labels", "labels_N")):
        np.testing.assert_array_equal(out[name], np.concatenate([getattr(m, field) for m in done]))
    np.testing.assert_array_equal(out["gather"], np.concatenate([m.gather_A for m in done]))
    np.testing.assert_array_equal(out["features_out"], np.concatenate([m.features_FA.ravel() for m in done]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_a_response(host, objective, estimator):
    random = np.random.default_rng([OBJECTIVES.index(objective), ESTIMATORS.index(estimator)])
    config = loss_config(objective, estimator)
    totals = np.zeros(3, np.int64)
    for _ in range(80):
        rows_T = int(random.integers(1, 12))
        rows = loss_inputs(random, [rows_T])
        loss, gradient, clipped = on_host(host, rows, config)
        tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
        expected_loss, expected_gradient = loss_in_torch(tensors, [rows_T], config)
        np.testing.assert_allclose(loss, expected_loss, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient.numpy(), rtol=2e-5, atol=1e-6)
        log_ratio_T = rows["logp"] - rows["old_logp"]
        masks = clip_masks(log_ratio_T, rows["advantage"][:1], np.array([0, rows_T]), config)
        assert clipped.tolist() == [masks[edge].sum() for edge in ("low", "high", "dual")]
        totals += clipped
    assert totals.all(), "the rows must meet every edge"


def on_host(
    host: ctypes.CDLL, rows: dict[str, np.ndarray], config: LossConfig
) -> tuple[float, np.ndarray, np.ndarray]:
    bounds = clip_bounds(config)
    settings = LossSettings(
        OBJECTIVES.index(config.objective),
        bounds.low,
        bounds.high,
        bounds.dual,
        config.tis_cap,
        config.kl_coefficient,
        ESTIMATORS.index(config.kl_estimator),
    )
    table = np.stack(list(rows.values()), 1).astype(np.float32)
    gradient, clipped = np.zeros(len(table), np.float32), np.zeros(3, np.int64)
    count = ctypes.c_int64(len(table))
    loss = host.response_loss(
        ctypes.byref(settings), address(table), count, address(gradient), address(clipped)
    )
    return loss, gradient, clipped


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_broken_log_prob_reaches_the_loss(host, objective):
    config = LossConfig(objective=objective, clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_estimator="k2")
    for advantage in (1.0, -1.0):
        rows = loss_inputs(np.random.default_rng(0), [3])
        rows["advantage"][:], rows["logp"][1] = advantage, np.nan
        loss, _, _ = on_host(host, rows, config)
        assert math.isnan(loss)
