"""The whole training step on a fake cuda:0: devices, types, launches, waits and copies; no values.

A GPU is not needed: FakeTensorMode computes shape, type and device of every operation and runs none of them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fake_cuda.cases import CASES, TE, Case
from support.models import make_model
from support.te_stand_in import PATH

WORKER = Path(__file__).with_name("step_worker.py")
PARTS = ("Policy.log_probs", "Policy.accumulate_gradients")

LAYER_LAUNCHES = {
    "dense": (80, 203),
    "full": (80, 283),
    "te": (80, 203),
    "kernels": (71, 189),
    "cp2": (97, 244),
}
"""Kernels of a dense layer in bf16, at most: (forward pass; forward and backward pass).

A layer of 16,384 rows of Qwen3-4B takes milliseconds, and a launch microseconds. Torch's RMSNorm counts as
its parts here, about eight, where CUDA has one kernel. Higher numbers are a change to look at: a type that is
converted to and fro, or a loop over segments.
"""
FLOAT32_PRODUCTS = {
    "megatron_bicc/model/log_probs.py:_forward_chunk": "the entropy's sum over the vocabulary",
    "megatron_bicc/model/gradient_sketch.py:add": "products of projections, 64 x rows x 256",
    "megatron/core/transformer/moe/moe_utils.py:forward": "the router, moe_router_dtype",
    "megatron/core/transformer/moe/moe_utils.py:backward": "the router, moe_router_dtype",
}
"""Matrix products of a bf16 policy that are in float32, with the reason"""
COPIES = {"PackedBatch.make": 1, "TrainBatch.make": 0}
"""Copies to the device per micro-batch, at most: without csrc's kernels one of its rows and segments; what
the loss needs of each row is gathered on the device"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Returns the worker's report of every case, by name."""
    root = tmp_path_factory.mktemp("fake_cuda")
    for model in {case.model for case in CASES.values()}:
        for layers in (1, 2):
            make_model(model, layers).save_pretrained(root / "models" / f"{model}_{layers}")
    found: dict[str, dict[str, Any]] = {}
    for backend, paths in (("local", []), (TE, [str(PATH)])):
        cases = {name: case for name, case in CASES.items() if case.backend == backend}
        out = root / backend
        out.mkdir()
        orders = out / "orders"
        orders.write_text(
            json.dumps(
                {
                    "cases": [asdict(case) for case in cases.values()],
                    "models": str(root / "models"),
                    "reports": str(out),
                    "paths": paths,
                }
            )
        )
        # a fresh Python, not the warm one: the device must be there before torch is imported
        subprocess.run(
            [sys.executable, "-W", "ignore", WORKER, orders],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        found |= {name: json.loads((out / f"{i}.json").read_text()) for i, name in enumerate(cases)}
    return found


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def report(name: str, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the report of a step that has ended. A tensor on the wrong device ends it."""
    assert "error" not in reports[name], reports[name]["error"]
    return reports[name]


def micro_batches(report: dict[str, Any], part: str) -> int:
    """Returns how many micro-batches the passes of a part take: one each, or one a trained layout."""
    return sum(report["micro_batches"]) if part == "Policy.accumulate_gradients" else report["calls"][part]


def beyond(found: dict[str, int], most: dict[str, int]) -> dict[str, int]:
    """Returns the counts that are higher than they may be."""
    return {what: count for what, count in found.items() if count > most.get(what, 0)}


def test_state_has_the_types_that_it_should(name: str, report: dict[str, Any]) -> None:
    policy = f"cuda torch.{CASES[name].dtype}"
    assert report["types"] == {
        "weights": [policy],
        "gradients": ["cuda torch.float32"],
        "main weights": ["cuda torch.float32"],
        "moments": ["cuda torch.float32"],
    }
    assert report["checkpoint"] == ["cpu"]
    assert len(report["buckets"]) > 2
    assert all(kinds == [policy.replace("cuda", "cpu"), policy] for kinds in report["buckets"])


def test_products_are_in_the_policys_type(name: str, report: dict[str, Any]) -> None:
    found = sum((Counter(c) for c in report["products"].values()), Counter())
    if CASES[name].dtype == "float32":
        # bf16 factors would lose what float32 was chosen for
        assert found
        assert not [what for what in found if "bfloat16" in what]
    else:
        assert not [what for what in found if what.partition(": ")[0] not in FLOAT32_PRODUCTS]


def waits(case: Case, part: str) -> dict[str, int]:
    """Returns where the host may wait for the device, per micro-batch."""
    found: dict[str, int] = {}
    if case.stage is not None:
        # megatron-core, after a batch of sends and receives: config.batch_p2p_sync
        found["megatron/core/pipeline_parallel/p2p_communication.py:_communicate: synchronize"] = 2
    if case.model == "qwen3_moe":
        # the rows of each expert are cut out by the host, in every layer's forward pass
        passes = 2 if case.recompute == "full" and part == "Policy.accumulate_gradients" else 1
        moe = "megatron/core/transformer/moe/moe_utils.py"
        found[f"{moe}:maybe_move_tensor_to_cpu: copy to the host"] = 2 * passes * case.layers
        found[f"{moe}:permute: masked_select"] = 2 * passes * case.layers
    return found


@pytest.mark.parametrize("part", PARTS)
def test_no_layer_waits_for_the_device(name: str, part: str, report: dict[str, Any]) -> None:
    most = {what: count * micro_batches(report, part) for what, count in waits(CASES[name], part).items()}
    # the losses of all micro-batches, once
    most["megatron_bicc/model/policy.py:accumulate_gradients"] = 1
    assert not beyond(report["syncs"].get(part, {}), most)


def test_waits_of_an_optimizer_step_are_a_fixed_number(name: str, report: dict[str, Any]) -> None:
    most = {
        "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,
        "megatron_bicc/model/policy.py:is_finite": 1,
        "megatron_bicc/model/policy.py:_on_all_ranks": 1,
    }
    if CASES[name].backend == "local":
        # without Transformer Engine or apex megatron-core reads every tensor's norm: 10 microseconds each
        most["megatron/core/utils.py:local_multi_tensor_l2_norm"] = report["tensors"]
    assert not beyond(report["syncs"]["Policy.update"], most)
    rest = {
        "megatron_bicc/algorithms/statistics.py:gradient_statistics": 2,
        "megatron_bicc/training/batch.py:sum_scalar": 1,
        # log-probs: old, reference, and of each trained layout
        "megatron_bicc/training/batch.py:gather_tokens: copy to the host": 4,
        # the policy's weights, while the reference's are in their place
        "megatron_bicc/model/policy.py:<listcomp>: copy to the host": report["tensors"],
    }
    if CASES[name].model == "qwen3_moe":
        rest["megatron_bicc/algorithms/statistics.py:expert_statistics: copy to the host"] = 1
    assert not beyond(report["syncs"]["rest"], rest)


def test_passes_copy_nothing_to_the_device(name: str, report: dict[str, Any]) -> None:
    for part in PARTS:
        assert not report["copies"].get(part)
    for part, most in COPIES.items():
        copies = sum(report["copies"].get(part, {}).values())
        assert copies <= most * report["calls"].get(part, 0), part


@pytest.mark.parametrize("of", LAYER_LAUNCHES)
def test_launches_of_a_layer(of: str, reports: dict[str, dict[str, Any]]) -> None:
    total = lambda name, part: sum(reports[name]["launches"][part].values())  # noqa: E731
    found = [total(f"{of}, 2 layers", part) - total(of, part) for part in PARTS]
    assert all(0 < count <= most for count, most in zip(found, LAYER_LAUNCHES[of], strict=True)), found


def test_context_ranks_exchange_keys_and_values_once_in_each_pass_of_a_layer(
    reports: dict[str, dict[str, Any]],
) -> None:
    counts = lambda name, part: Counter(reports[name]["collectives"][part])  # noqa: E731
    forward, both = (counts("cp2, 2 layers", part) - counts("cp2", part) for part in PARTS)
    assert forward == {"_allgather_base_": 1}
    assert both == {"_allgather_base_": 2, "alltoall_base_": 1}
