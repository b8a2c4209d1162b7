"""Tests the same steps under every layout of up to four processes, and of eight with four context ranks.

Compared are loss, gradients, their norm and the updated weights.
"""

import re
from pathlib import Path

import pytest
import torch
from support.hf_reference import Example, response_logp
from support.models import make_model
from support.steps import make_examples, perturb
from support.torchrun import torchrun
from training import step_worker
from training.step_worker import (
    EDGE_ROWS,
    EDGES,
    MODELS,
    RESHARDED,
    Training,
    expert_layouts,
    layouts,
    run_steps,
)
from transformers import PreTrainedModel

# the first test starts every process; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
ALL = [(processes, name) for processes in (1, 2, 4, 8) for name in layouts(processes)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What step_worker.py reads, but for a checkpoint."""
    root = tmp_path_factory.mktemp("layouts")
    for name, family in MODELS.items():
        model = make_model(family, layers=4)
        model.save_pretrained(root / name)
        perturb(model).save_pretrained(root / f"{name}_moved")
        torch.save(make_examples(model, 0.8), root / f"{name}.pt")
        if name == "dense":
            for edge in EDGES:
                torch.save([edge_example(model, edge)], root / f"{edge}.pt")
    return root


def edge_example(model: PreTrainedModel, edge: str) -> Example:
    """A right and a wrong response to a prompt."""
    tokens, *lengths = {
        "long_response": (3, 60, 5),
        "long_prefix": (70, 3, 7),
        "few_rows": (2, 1, 1),
        "one_token": (1, 1, 1),
    }[edge]
    generator = torch.Generator().manual_seed(len(edge))
    draw = lambda count: torch.randint(2, 90, (count,), generator=generator).tolist()  # noqa: E731
    prompt, responses = draw(tokens), [draw(length) for length in lengths]
    with torch.no_grad():
        logp = [response_logp(model, prompt, o, 0.8) for o in responses]
    noise = [0.1 * torch.randn(len(x), generator=generator) for x in logp]
    return Example(prompt, responses, [1.0, 0.0], [x + y for x, y in zip(logp, noise, strict=True)])


@pytest.fixture(scope="module")
def one_process(inputs: Path, single_process: None) -> dict[str, list[dict]]:
    """The steps of each model without any parallelism or recompute; leaves a checkpoint in `inputs`."""
    return {model: run_steps(inputs, "one", model, {}) for model in MODELS}


@pytest.fixture(scope="module")
def found(inputs: Path, one_process: dict) -> dict[tuple[int, str], list[dict]]:
    """The steps of every layout; starting a process costs more than its steps, so each number starts once."""
    here = {(1, name): run_steps(inputs, name, *layout) for name, layout in layouts(1).items()}
    return here | {(n, name): steps for n in (2, 4, 8) for name, steps in launch(inputs, n).items()}


def launch(inputs: Path, processes: int) -> dict[str, dict]:
    """What step_worker.py writes."""
    out = inputs / f"out{processes}.pt"
    torchrun(processes, step_worker.__file__, inputs, out)
    return torch.load(out)


@pytest.mark.parametrize(("processes", "layout"), ALL)
def test_layout_equals_one_process(
    processes: int,
    layout: str,
    found: dict[tuple[int, str], list[dict]],
    one_process: dict[str, list[dict]],
) -> None:
    """A second step shows copies of a weight that the first one left apart; a third entry is one more."""
    model, _ = layouts(processes)[layout]
    steps, first_and_second = found[processes, layout], one_process[model]
    assert_equal(steps[0], first_and_second[0])
    for second in steps[1:]:
        assert_equal(second, first_and_second[1])


def assert_equal(step: dict, one: dict) -> None:
    """A layout's step is that of one process, and processes that hold a weight hold the same one."""
    own, expected = step["metrics"], one["metrics"]
    # terms of size |A| cancel in the loss
    assert own["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5, abs=1e-6)
    assert own["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-5)
    # token counts depend on the packing
    assert of_rollouts(own) == pytest.approx(of_rollouts(expected), rel=1e-4, abs=1e-6)
    for log_probs, truth in zip(step["log_probs"], one["log_probs"], strict=True):
        torch.testing.assert_close(log_probs, truth, rtol=1e-5, atol=1e-5)
    assert step["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        difference = (step["gradients"][name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm(), (
            f"{name}: error {difference:.1e} of {gradient.norm():.1e}"
        )
    assert step["weights"].keys() == one["weights"].keys()
    assert experts(step["weights"]) == experts(one["weights"])
    for name, weight in one["weights"].items():
        difference = (step["weights"][name] - weight).abs().max()
        assert difference <= 1e-5, f"{name} differs by {difference:.1e}"
    assert not step["unequal"]


@pytest.mark.parametrize(("processes", "layout"), ALL)
def test_a_nan_on_one_rank_is_refused_on_all(
    processes: int, layout: str, found: dict[tuple[int, str], dict]
) -> None:
    refusals = found[processes, layout][0]["refusals"]
    assert len(refusals) == processes
    assert set(refusals) == {refusals[0]}
    assert re.match(
        r"the gradient is not finite: model\.\S*norm\.weight and .* left as they were$", refusals[0]
    )


def of_rollouts(metrics: dict[str, float]) -> dict[str, float]:
    """Those that do not depend on the packing."""
    return {name: value for name, value in metrics.items() if not name.startswith("tokens/")}


def experts(weights: dict) -> list[str]:
    """Their names layer by layer, in the order in which they came."""
    return sorted((n for n in weights if ".experts." in n), key=lambda name: name.partition(".mlp.")[0])


@pytest.mark.parametrize("layout", RESHARDED)
def test_one_process_takes_the_step_after_a_layouts_checkpoint(
    layout: str, found: dict[tuple[int, str], list[dict]], inputs: Path, one_process: dict[str, list[dict]]
) -> None:
    """The other way round is among the layouts' own steps."""
    training = Training(inputs, "moe", {})
    training.load(inputs / "saved" / layout)
    assert_same_bits(training.weights(), newest(found, layout)[0]["weights"])
    assert_equal(training.step(), one_process["moe"][1])


@pytest.mark.parametrize("layout", RESHARDED)
def test_a_layout_loads_the_weights_that_one_process_saved(
    layout: str, found: dict[tuple[int, str], list[dict]], one_process: dict[str, list[dict]]
) -> None:
    assert_same_bits(newest(found, layout)[-1]["loaded"], one_process["moe"][0]["weights"])


def newest(found: dict[tuple[int, str], list[dict]], layout: str) -> list[dict]:
    """The steps of a layout on the most processes, which have saved the last checkpoint under its name."""
    return found[max((processes, name) for processes, name in found if name == layout)]


def assert_same_bits(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    assert not [name for name, weight in weights.items() if not torch.equal(weight, others[name])]


def test_layouts_with_experts_are_all_that_start_up_accepts() -> None:
    """Some of them, written out."""
    assert set(expert_layouts(2)) == {"moe", "ep2", "ep2_cp2", "pp2", "pp2_vpp2", "tp2_sp", "tp2_sp_ep2"}
    assert {"ep4", "pp4", "tp2_sp_ep4", "tp2_sp_pp2", "tp2_sp_pp2_vpp2_ep2"} < set(expert_layouts(4))


def test_micro_batches_are_unequal_and_some_are_empty(found: dict[tuple[int, str], list[dict]]) -> None:
    bilateral = found[1, "one-none"][0]["response_rows"][0]
    assert len(set(bilateral)) == 3
    # the virtual pipeline has to round this number up
    assert [len(rank) for rank in found[2, "vpp2-none"][0]["response_rows"]] == [3, 2]
    assert [0] in found[4, "dp4-none"][0]["response_rows"]


@pytest.mark.parametrize("edge", EDGES)
def test_four_context_ranks_equal_one_process(
    edge: str, found: dict[tuple[int, str], list[dict]], inputs: Path, single_process: None
) -> None:
    """A sequence-level objective with every other term of the loss, in both packings."""
    (step,) = found[4, edge]
    assert_equal(step, Training(inputs, "dense", {}, edge).step())


def test_the_edges_of_the_division_occur(found: dict[tuple[int, str], list[dict]]) -> None:
    long_response, long_prefix, few_rows, one_token = (found[4, edge][0]["chunks"] for edge in EDGES)
    for chunks in (*long_response, *long_prefix):
        assert sum(map(sum, chunks)) > 2 * EDGE_ROWS and all(chunks)
    # the chunks of a segment that is cut differ by at most one row; 60 and 69 rows are not 8 equal chunks
    assert any(len(set(own)) > 1 for chunks in long_response + long_prefix for own in chunks)
    assert any([] in chunks for chunks in few_rows)
    assert [[], [], [1], [1]] in map(sorted, one_token)
