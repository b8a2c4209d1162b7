"""Tests fields of megatron-core's configurations as settings: names, types, refusals, and the same steps."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from model import megatron_settings_worker
from support.models import make_model
from support.steps import TOKENIZER, make_examples, perturb, to_groups
from support.torchrun import torchrun
from torch.overrides import TorchFunctionMode
from training.step_worker import MODELS, Training, configure

from megatron_bicc.checkpoint.checkpoint import Progress
from megatron_bicc.checkpoint.resume import check_resume
from megatron_bicc.cli import parse_config
from megatron_bicc.config import Config
from megatron_bicc.consistency import _facts
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model import megatron_settings
from megatron_bicc.model import policy as policy_module
from megatron_bicc.model.megatron_settings import (
    NAMES,
    NEEDED,
    RANGES,
    REFUSED,
    check_megatron_settings,
    row_alignment,
)
from megatron_bicc.startup import check_policy, check_settings
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy

POLICY = Path(__file__).parents[2] / "examples/tiny_policy"
OFFLOAD = "megatron.optimizer.optimizer_cpu_offload=true"
FRACTION = "megatron.optimizer.optimizer_offload_fraction=1.0"


def checked(*settings: str) -> Config:
    config = parse_config(list(settings))
    check_megatron_settings(config)
    return config


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """Returns the line that refuses settings, of a command line or of a file."""

    def line(*settings: str, file: str = "") -> str:
        if file:
            (tmp_path / "run.yaml").write_text(file)
            settings = ("--config", str(tmp_path / "run.yaml"))
        with pytest.raises(SystemExit):
            parse_config(list(settings))
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 600
        found = error.removeprefix("python -m megatron_bicc.train: error: ").strip()
        return found.replace(f"{tmp_path}/", "")

    return line


@pytest.mark.parametrize(
    "setting",
    [
        "megatron.transformer.moe_permute_fusion=false",
        "megatron.transformer.deterministic_mode=true",
        "megatron.transformer.recompute_num_layers=null",
        "megatron.transformer.moe_router_dtype=fp64",
        "megatron.ddp.bucket_size=40000000",
        "megatron.optimizer.optimizer_offload_fraction=0",
        "megatron.optimizer.exp_avg_dtype=bfloat16",
    ],
)
def test_a_value_of_the_fields_type_is_accepted(setting: str) -> None:
    checked(setting)


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        ("megatron.transformer.recompute_modules=[core_attn, mlp]", "model.recompute=selective"),
        ("megatron.transformer.recompute_method=block", "model.recompute=full"),
        ("megatron.transformer.recompute_num_layers=1", "model.recompute=full"),
        ("megatron.optimizer.optimizer_offload_fraction=1", OFFLOAD),
        ("megatron.optimizer.optimizer_offload_fraction=5e-1", OFFLOAD),
        ("megatron.optimizer.overlap_cpu_optimizer_d2h_h2d=true", OFFLOAD),
        ("megatron.transformer.cpu_offloading_num_layers=1", "megatron.transformer.cpu_offloading=true"),
    ],
)
def test_a_field_that_has_no_effect_without_another_setting_is_refused(
    setting: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_settings, "HAVE_TE", True)
    name = setting.partition("=")[0]
    off = f"{needed.partition('=')[0]}={'none' if needed.startswith('model') else 'false'}"
    for settings in ([setting], [setting, off]):
        with pytest.raises(UserError, match=rf"^{name} is .*; it has no effect without {needed}: set that"):
            checked(*settings)
    is_other = needed == OFFLOAD and "fraction" not in setting
    checked(setting, needed, *([FRACTION] if is_other else []))


def test_an_offload_of_nothing_is_refused() -> None:
    for settings in ([OFFLOAD], [OFFLOAD, "megatron.optimizer.optimizer_offload_fraction=0.0"]):
        with pytest.raises(UserError, match=r"optimizer_offload_fraction to the host, which is 0: set it"):
            checked(*settings)
    checked(OFFLOAD, FRACTION)


def test_every_name_of_the_tables_is_a_field_that_can_be_set() -> None:
    known = {
        f"{section}.{field.name}": field
        for cls, section in NAMES.items()
        for field in fields(cls)
        if not any(field.name in names for names in REFUSED[cls].values())
    }
    assert RANGES.keys() <= {field.name for field in known.values()}
    for needed, names in NEEDED.items():
        assert {*names, needed.partition("=")[0]} - known.keys() <= {"model.recompute"}
    numbers = [field.default for field in known.values() if type(field.default) in (int, float)]
    assert numbers and min(numbers) >= 0  # a number below 0 is refused, whatever its field


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("transformer.recompute_module=[mlp]", "is unknown: .* no field .*; did you mean recompute_modules?"),
        ("transformer.recompute_modules=mlp", "is 'mlp'; it must be a list, each text or null"),
        ("transformer.recompute_modules=[1]", r"is \[1\]; it must be a list, each text or null"),
        ("transformer.recompute_modules=[true, null]", r"is \[true, null\]; it must be a list"),
        ("transformer.recompute_num_layers=0", "is 0; it must be at least 1"),
        ("transformer.num_layers_at_end_in_bf16=-1", "is -1; it must be at least 0"),
        ("ddp.bucket_size=0", "is 0; it must be at least 1"),
        (f"ddp.bucket_size=0x{'f' * 5000}", r"is 0xf+\.\.\.; it must be at least 1 and less than"),
        ("ddp.bucket_size=1e7", "is '1e7'; it must be a whole number or null; write 10000000$"),
        ("ddp.bucket_size=1.5e7", "is '1.5e7'; it must be a whole number or null; write 15000000$"),
        ("ddp.bucket_size=2.5", "is 2.5; it must be a whole number or null$"),
        ("ddp.overlap_grad_reduce=null", "is null; it must be true or false$"),
        ("ddp.bucket_size=2025-13-45", "is '2025-13-45'; it must be a YAML value"),
        ("ddp.bucket_size=0b_", "is '0b_'; it must be a YAML value"),
        ("ddp.bucket_size=!!int abc", "is '!!int abc'; it must be a YAML value"),
        (f"ddp.bucket_size={'9' * 5000}", r"is '9+\.\.\.; it must be a YAML value"),
        (f"ddp.bucket_size={'[' * 1000}", r"is '\[+\.\.\.; it must be a YAML value"),
        (f"ddp.bucket_size={'[' * 300}{']' * 300}", r"is \[+\.\.\.\]+; it must be a whole number"),
        ("ddp.bucket_size=&a [*a]", r"is '&a \[\*a\]'; it must be a YAML value"),
        (f"ddp.bucket_size={'x' * 100_000}", r"is 'x+\.\.\.x+'; it must be a whole number"),
        ("optimizer.optimizer_offload_fraction=.nan", "is nan; it must be within 0 and 1"),
        ("optimizer.optimizer_offload_fraction=inf", "is 'inf'; it must be within 0 and 1"),
        ("optimizer.optimizer_offload_fraction=-1", "is -1; it must be within 0 and 1"),
        ("optimizer.optimizer_offload_fraction=5", "is 5; it must be within 0 and 1"),
        (f"optimizer.optimizer_offload_fraction=1{'0' * 400}", r"is 10+\.\.\.; it must be a number"),
        (
            "optimizer.use_precision_aware_optimizer=true",
            "is true; it needs Transformer Engine, which is not",
        ),
        ("transformer.deterministic_mode=1", "is 1; it must be true or false"),
        ("transformer.recompute_num_layers=true", "is true; it must be a whole number or null"),
        ("transformer.moe_router_dtype=fp8", "is 'fp8'; it must be fp32 or fp64 or null"),
        ("ddp.bucket_size=small", "is 'small'; it must be a whole number or null"),
        ("optimizer.optimizer_offload_fraction=half", "is 'half'; it must be a number"),
        ("optimizer.exp_avg_dtype=tensor", "is 'tensor'; it must be a type of torch, such as bfloat16"),
        ("transformer.tensor_model_parallel_size=2", "cannot be set: set parallel.tensor"),
        ("transformer.params_dtype=bfloat16", "cannot be set: set model.dtype"),
        ("transformer.calculate_per_token_loss=false", "cannot be set: losses are normalised"),
        ("transformer.init_method=null", "cannot be set: it takes an object of Python"),
        ("ddp.use_distributed_optimizer=false", "cannot be set: the wrapper is"),
        ("ddp.grad_reduce_in_fp32=false", "cannot be set: gradients are summed in fp32"),
        ("ddp.overlap_param_gather=true", "cannot be set: whole weights are needed right after an update"),
        ("optimizer.lr=1", "cannot be set: set optimizer.lr"),
        ("optimizer.bf16=true", "cannot be set: set model.dtype"),
        ("transformer.fp8=hybrid", "is 'hybrid'; it needs Transformer Engine, which is not installed"),
        ("transformer.recompute_modules=[layernorm]", r"is \['layernorm'\]; it needs Transformer Engine"),
    ],
)
def test_a_mistake_is_one_line_with_name_and_remedy(
    setting: str, line: str, refused: Callable[..., str]
) -> None:
    name = setting.partition("=")[0]
    assert re.match(rf"command line: megatron\.{name} {line}", found := refused(f"megatron.{setting}")), found


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 100_000])
def test_a_name_that_is_empty_long_or_of_two_lines_is_shown_as_such(
    name: str, refused: Callable[..., str]
) -> None:
    shown = "x" * 100 + "..." if name[:1] == "x" else repr(name)
    assert f"command line: megatron.ddp.{shown} is unknown" in refused(f"megatron.ddp.{name}=1")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("megatron:\n  ddp: {bucket_size: 0}", "run.yaml line 2: megatron.ddp.bucket_size is 0; it must"),
        (
            "megatron:\n  ddp:\n    bucket_size: 2025-13-45",
            "line 3: megatron.ddp.bucket_size is '2025-13-45'; it",
        ),
        ("megatron:\n  ddp: {bucket_size: &a [*a]}", "run.yaml line 2: not YAML: a value contains itself"),
        ("megatron: &a {ddp: *a}", "run.yaml line 1: not YAML: a value contains itself"),
        ("seed: 1\na: &a {b: *a}", "run.yaml line 2: not YAML: a value contains itself"),
        ("seed: 1\n? [a]\n: 1", "run.yaml line 2: a list or a mapping is no name of a setting"),
    ],
)
def test_a_mistake_in_a_file_names_its_line(file: str, line: str, refused: Callable[..., str]) -> None:
    assert line in refused(file=file)


def test_an_alias_stands_for_a_value(tmp_path: Path) -> None:
    aliases = "megatron:\n  transformer: {recompute_modules: &a [mlp], offload_modules: *a}\n"
    (tmp_path / "run.yaml").write_text(aliases)
    found = parse_config(["--config", str(tmp_path / "run.yaml")]).megatron.transformer
    assert found == {"recompute_modules": ["mlp"], "offload_modules": ["mlp"]}


@pytest.mark.parametrize(("unit", "divides"), [(1, True), (2, True), (3, False), (8, False)])
def test_units_of_uniform_recomputation_divide_the_layers_of_a_stage(unit: int, divides: bool) -> None:
    """megatron-core's loop would ask for a layer that the stage does not have."""
    name = "megatron.transformer.recompute_num_layers"
    config = parse_config([f"model.path={POLICY}", "model.recompute=full", f"{name}={unit}"])
    with nullcontext() if divides else pytest.raises(UserError, match=f"^{name} is {unit}; .* the 4 layers"):
        check_policy(config)


def test_what_megatron_core_refuses_together_is_refused_before_processes_connect() -> None:
    config = parse_config([f"model.path={POLICY}", "model.recompute=selective"])
    config.megatron.transformer |= {"recompute_modules": ["mlp", "attn"], "deterministic_mode": False}
    with pytest.raises(
        UserError, match=r"^megatron.transformer.recompute_modules, .*refuses them .*Invalid choices"
    ):
        check_policy(config)


def test_an_optimizer_on_the_host_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    settings = [f"model.path={POLICY}", f"data.train={POLICY}/config.json", f"output_dir={tmp_path}"]
    settings += [OFFLOAD, FRACTION]
    with pytest.raises(UserError, match="optimizer_cpu_offload is true; this run is on the CPU already"):
        check_settings(parse_config(settings))
    check_settings(parse_config([*settings, "dry_run=true"]))


def test_rows_are_whole_blocks_of_quantized_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_settings, "HAVE_TE", True)
    tensor, fp8 = "parallel.tensor=2", "megatron.transformer.fp8=hybrid"
    assert row_alignment(parse_config([tensor])) == 2
    assert row_alignment(parse_config([tensor, fp8])) == 2 * 16
    assert row_alignment(parse_config([tensor, fp8, "megatron.transformer.fp8_recipe=mxfp8"])) == 2 * 32
    assert row_alignment(parse_config([tensor, "megatron.transformer.fp4=e2m1"])) == 2 * 128


def test_every_refused_name_is_a_field_once() -> None:
    """A new megatron-core that renames one fails here: a refusal must not turn into an accepted setting."""
    for cls in NAMES:
        refused = [name for names in REFUSED[cls].values() for name in names]
        assert len(refused) == len(set(refused))
        assert set(refused) <= {field.name for field in fields(cls)}


def test_they_are_settings_of_a_run_to_the_other_processes_and_to_a_resumed_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = checked("megatron.ddp.overlap_grad_reduce=true")
    assert _facts(now, {}, "local")["setting megatron.ddp.overlap_grad_reduce"] == "True"

    def resume(before: Config, now: Config) -> list[str]:
        caplog.clear()
        check_resume(Progress(4, {}, {}, asdict(before), {}), now, {}, first_process=True)
        return caplog.messages

    added, removed = "was not set, is True", "was True, is not set"
    name = "changed since step 4: megatron.ddp.overlap_grad_reduce: "
    assert resume(Config(), now) == [name + added]
    assert resume(now, Config()) == [name + removed]
    assert resume(now, now) == []
    with pytest.raises(UserError, match="megatron.transformer.fp8_recipe: was not set, is delayed"):
        resume(Config(), parse_config(["megatron.transformer.fp8_recipe=delayed"]))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What step_worker.py's Training reads."""
    root = tmp_path_factory.mktemp("megatron_settings")
    for name, family in MODELS.items():
        model = make_model(family, layers=4)
        model.save_pretrained(root / name)
        perturb(model).save_pretrained(root / f"{name}_moved")
        torch.save(make_examples(model, 0.8), root / f"{name}.pt")
    return root


@pytest.fixture(scope="module")
def steps(inputs: Path, single_process: None) -> Callable[..., list[dict]]:
    """Two steps of one process; those without further settings run once."""
    known: dict[str, list[dict]] = {}

    def run(model: str, settings: dict[str, Any]) -> list[dict]:
        key = model if not settings else ""
        if key not in known:
            training = Training(inputs, model, settings)
            found = [training.step(), training.step()]
            if settings:
                return found
            known[key] = found
        return known[key]

    return run


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("dense", {"model.recompute": "selective", "megatron.transformer": {"recompute_modules": ["mlp"]}}),
        ("moe", {"model.recompute": "selective", "megatron.transformer": {"recompute_modules": ["moe"]}}),
        (
            "dense",
            {
                "model.recompute": "full",
                "megatron.transformer": {"recompute_method": "block", "recompute_num_layers": 2},
            },
        ),
    ],
)
def test_steps_with_other_recomputation_are_equal_to_the_bit(
    model: str, settings: dict[str, Any], steps: Callable[..., list[dict]]
) -> None:
    assert_same(steps(model, settings), steps(model, {}), 0.0)


class ClaimsCuda(TorchFunctionMode):
    """Test double of a GPU: tensors say that they are on one, but for those that `cpu()` has returned."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return not hasattr(args[0], "is_on_host")
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            found = found.clone()
            found.is_on_host = True
        return found


def test_an_optimizer_on_the_host_takes_the_same_steps(
    inputs: Path, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of it there; in bf16, since megatron-core's offload takes fp32 main weights only."""
    plain = learner_in_bf16(inputs, {})
    start = main_weights(plain)
    make = policy_module.make_optimizer

    def claiming(*arguments: Any) -> Any:
        with ClaimsCuda():
            return make(*arguments)

    monkeypatch.setattr(policy_module, "make_optimizer", claiming)
    offloaded = learner_in_bf16(
        inputs, {"megatron.optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}}
    )
    optimizer = offloaded.policy.optimizer.chained_optimizers[0].optimizer
    on_host = sum(x.numel() for x in optimizer.gpu_params_map_cpu_copy.values())
    assert 0.5 * len(start) <= on_host < len(start)
    groups = to_groups(torch.load(inputs / "dense.pt", weights_only=False))
    for _ in range(2):
        (one,), (other,) = (learner.step(groups, Stopwatch()) for learner in (plain, offloaded))
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-2)
    moved = (main_weights(plain) - start).abs().mean()
    assert (main_weights(offloaded) - main_weights(plain)).abs().mean() < 1e-2 * moved


def learner_in_bf16(inputs: Path, settings: dict[str, Any]) -> Learner:
    config = configure(inputs / "dense", {"model.dtype": "bfloat16"} | settings)
    return Learner(config, load_policy(config), TOKENIZER)


def main_weights(learner: Learner) -> torch.Tensor:
    groups = learner.policy.optimizer.param_groups
    return torch.cat([x.detach().flatten().clone() for group in groups for x in group["params"]])


@pytest.fixture(scope="module")
def two_processes(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("two") / "out.pt"
    torchrun(2, megatron_settings_worker.__file__, inputs, out)
    return torch.load(out)


@pytest.mark.parametrize("case", ["overlap", "overlap_moe"])
def test_gradients_reduced_during_backward_are_the_same(
    case: str, two_processes: dict[str, list[dict]]
) -> None:
    """Over several micro-batches: reduced after each, they would count several times."""
    plain = two_processes[case.replace("overlap", "plain")]
    assert_same(two_processes[case], plain, 1e-6)
    assert two_processes[case][0]["buckets"] > plain[0]["buckets"] == 1
    assert sum(map(len, plain[0]["response_rows"])) > 2  # more than one for each process


def test_a_step_may_have_other_micro_batches_than_the_first(inputs: Path, single_process: None) -> None:
    """megatron-core learns in the first step when gradients are complete; it must not count micro-batches."""
    overlap = {"megatron.ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}}
    found = []
    for settings in ({}, overlap):
        training = Training(inputs, "dense", settings)
        groups = training.groups
        found.append([training.step()])
        training.groups = groups[:1]
        found[-1].append(training.step())
    first, second = (sum(map(len, step["response_rows"])) for step in found[0])
    assert first != second
    assert_same(found[1], found[0], 1e-6)


def assert_same(found: list[dict], expected: list[dict], atol: float) -> None:
    for step, one in zip(found, expected, strict=True):
        assert step["metrics"]["train/grad_norm"] == pytest.approx(
            one["metrics"]["train/grad_norm"], rel=atol, abs=0
        )
        assert step["weights"].keys() == one["weights"].keys()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(step["weights"][name], weight, atol=atol, rtol=0)
        assert not step["unequal"]
