"""Tests that every setting has an effect or is refused, and that no value out of its range is accepted.

A setting without an entry in CHANGES or TESTS fails here, so a new field cannot be forgotten.
"""

import ast
import json
import math
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_bicc.algorithms.advantages import BASELINES, TokenLogProbs, advantages
from megatron_bicc.algorithms.corrections import correction_weights
from megatron_bicc.algorithms.policy_loss import OBJECTIVES
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.cli import parse_config
from megatron_bicc.config import Config, Setting, settings
from megatron_bicc.errors import UserError
from megatron_bicc.model.optimizer import make_scheduler
from megatron_bicc.model.policy import ddp_config
from megatron_bicc.planning.synthetic import UnknownTokenizer, draw_rollouts
from megatron_bicc.rewards.registry import BUILT_INS
from megatron_bicc.rollout.engines import ENGINES
from megatron_bicc.sglang.settings import pause_mode
from megatron_bicc.startup import heldout_prompts, read_tokenizer, validate
from megatron_bicc.training.batch import packing_settings
from megatron_bicc.weights.hf_files import supported_config

REPOSITORY = Path(__file__).parents[2]
POLICY = REPOSITORY / "examples/tiny_policy"


def packed(config: Config, directory: Path) -> Any:
    return [astuple(s) for s in packing_settings(config, supported_config(POLICY), UnknownTokenizer())]


def drawn(config: Config, directory: Path) -> Any:
    batch = draw_rollouts(config, np.random.default_rng(config.seed))
    return [array.tolist() for array in vars(batch).values()]


def learning_rates(config: Config, directory: Path) -> Any:
    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = make_scheduler(config, optimizer)
    found = []
    for _ in range(5):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return found


def advantages_of_a_group(config: Config, directory: Path) -> Any:
    rollouts = SimpleNamespace(
        rewards_R=np.array([1, 0, 0], np.float32),
        offsets_R=np.array([0, 1, 2, 4]),
        group_offsets_B=np.array([0, 3]),
    )
    old_T, ref_T, rollout_T = (
        np.array(values, np.float32)
        for values in ([-1.0, -2.0, -3.0, -0.5], [-1.3, -1.9, -2.6, -0.9], [-1.1, -2.2, -2.9, -0.7])
    )
    found = advantages(rollouts, TokenLogProbs(old_T, ref_T, rollout_T, old_T), resolve(config))
    return np.asarray(found.advantage_R).tolist(), np.asarray(found.baseline_R).tolist()


def weights_of_a_response(config: Config, directory: Path) -> Any:
    log_ratio_T = np.array([-0.4, 0.1, 0.3])
    weights = correction_weights(log_ratio_T, np.zeros(3), np.array([0, 3]), resolve(config).loss)
    return weights.weight_T.tolist()


def questions(config: Config, directory: Path) -> Any:
    rows = [("1+1=", "2"), ("2+2=", "4"), ("12+34=", "46"), ("3<|end|>+3=", "6")]
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in rows))
    try:
        prompts = heldout_prompts(config, str(path), read_tokenizer(str(POLICY)))
    except UserError as refusal:
        return str(refusal)
    return [prompt.token_ids.tolist() for prompt in prompts]


def gradient_buckets(config: Config, directory: Path) -> Any:
    """megatron-core's configuration of the gradients' reduction."""
    return ddp_config(config)


def pauses(config: Config, directory: Path) -> Any:
    """What a weight sync makes of running requests."""
    return pause_mode(config.rollout)


def refusal(config: Config, directory: Path) -> Any:
    """The line with which a run of one process is refused; empty: it is not."""
    try:
        validate(config, world_size=1)
    except UserError as error:
        return str(error)
    return ""


RUN = [f"model.path={POLICY}", f"data.train={POLICY / 'config.json'}"]
SGLANG = [*RUN, "rollout.engine=sglang", f"rollout.sglang.python={sys.executable}"]
ATTACH = [*RUN, "rollout.engine=sglang", "rollout.launch=attach", "rollout.sglang.servers=http://h:1"]
RCC = ["algorithm=grpo+rcc"]
KL = ["algorithm=grpo", "loss.kl_coefficient=0.5", "loss.kl_in=reward"]
MASK = ["loss.correction=token_mask"]
SHORT = ["evaluation.prompts=3", "data.max_prompt_tokens=6"]
DECAY = ["train.steps=4", "optimizer.schedule=linear"]
Change = tuple[Callable[[Config, Path], Any], list[str], str]
CHANGES: dict[str, Change] = {
    "seed": (drawn, [], "2"),
    "algorithm": (advantages_of_a_group, [], "dr_grpo"),
    "train.max_sequence_tokens": (packed, [], "4095"),
    "train.max_tokens_per_microbatch": (packed, [], "16383"),
    "reward.threshold": (packed, [], "0.6"),
    "parallel.tensor": (packed, [], "2"),
    "bicc.context_ratio": (packed, [], "0.3"),
    "bicc.context_source": (packed, [], "pair"),
    "bicc.truncation": (packed, [], "in_order"),
    "bicc.keep": (packed, [], "tail"),
    "bicc.wrong_header": (packed, [], "a header of other length, in tokens"),
    "bicc.right_header": (packed, [], "a header of other length, in tokens"),
    "bicc.answer_header": (packed, [], "a header of other length, in tokens"),
    "rollout.prompts_per_step": (drawn, [], "31"),
    "rollout.group_size": (drawn, [], "7"),
    "rollout.max_new_tokens": (drawn, [], "2000"),
    "synthetic.prompt_tokens": (drawn, [], "100"),
    "synthetic.prompt_sigma": (drawn, [], "0.4"),
    "synthetic.response_tokens": (drawn, [], "100"),
    "synthetic.response_sigma": (drawn, [], "0.4"),
    "synthetic.pass_rate": (drawn, [], "0.1"),
    "loss.advantage": (advantages_of_a_group, [], "centered"),
    "loss.kl_coefficient": (advantages_of_a_group, KL, "0.4"),
    "loss.kl_in": (advantages_of_a_group, KL, "loss"),
    "loss.kl_estimator": (advantages_of_a_group, KL, "k3"),
    "loss.correction": (weights_of_a_response, [], "token_tis"),
    "loss.correction_low": (weights_of_a_response, MASK, "0.9"),
    "loss.correction_high": (weights_of_a_response, MASK, "1.2"),
    "loss.correction_veto": (weights_of_a_response, [], "0.7"),
    "rcc.enabled": (advantages_of_a_group, RCC, "false"),
    "rcc.form": (advantages_of_a_group, RCC, "exact"),
    "rcc.delta": (advantages_of_a_group, RCC, "sequence_sum"),
    "rcc.reference": (advantages_of_a_group, RCC, "rollout"),
    "train.steps": (learning_rates, DECAY, "5"),
    "train.updates_per_step": (learning_rates, DECAY, "2"),
    "optimizer.lr": (learning_rates, DECAY, "2e-6"),
    "optimizer.min_lr": (learning_rates, DECAY, "1e-7"),
    "optimizer.schedule": (learning_rates, DECAY, "cosine"),
    "optimizer.warmup_steps": (learning_rates, DECAY, "3"),
    "data.max_prompt_tokens": (questions, SHORT, "100"),
    "data.overlong_prompts": (questions, SHORT, "drop"),
    "data.control_tokens": (questions, [], "text"),
    "evaluation.prompts": (questions, ["data.control_tokens=text"], "2"),
    "evaluation.instruction": (questions, ["data.control_tokens=text"], "1+"),
    "model.path": (refusal, RUN, "/nowhere"),
    "megatron.transformer": (refusal, RUN, "recompute_method: block"),
    "megatron.ddp": (gradient_buckets, [], "bucket_size: 7"),
    "megatron.optimizer": (refusal, RUN, "overlap_cpu_optimizer_d2h_h2d: true"),
    "data.train": (refusal, RUN, "/nowhere"),
    "dry_run": (refusal, RUN[:1], "true"),
    "evaluation.data": (refusal, RUN, "/nowhere"),
    "monitoring.compare_run": (refusal, RUN, "/nowhere"),
    "loss.baseline": (refusal, [*RUN, "algorithm=grpo+rcc"], "mine:baseline"),
    "loss.clip_low": (refusal, RUN, "1.5"),
    "parallel.sequence": (refusal, RUN, "true"),
    "parallel.pipeline": (refusal, RUN, "2"),
    "parallel.virtual_pipeline": (refusal, RUN, "2"),
    "parallel.expert": (refusal, RUN, "2"),
    "parallel.context": (refusal, RUN, "2"),
    "rollout.max_prompts_per_step": (refusal, [*RUN, "rollout.dynamic_sampling=true"], "8"),
    "rollout.colocate": (refusal, RUN, "true"),
    "rollout.max_staleness": (refusal, RUN, "1"),
    "rollout.pause": (pauses, ["rollout.max_staleness=1"], "retract"),
    "rollout.engine": (refusal, [*RUN, "rollout.sglang.python=/nowhere"], "sglang"),
    "rollout.launch": (refusal, SGLANG, "attach"),
    "rollout.sglang.python": (refusal, SGLANG, "/nowhere"),
    "rollout.sglang.host": (refusal, SGLANG, "here"),
    "rollout.sglang.server_args": (refusal, SGLANG, "--port 1"),
    "rollout.sglang.gpus": (refusal, SGLANG, "all"),
    "rollout.sglang.servers_per_node": (refusal, [*SGLANG, "rollout.sglang.gpus=0"], "2"),
    "rollout.sglang.api_key_variable": (refusal, SGLANG, "KEY"),
    "rollout.sglang.servers": (refusal, ATTACH, "h:1"),
}
"""By setting: what shows it, the other settings that this takes, and a value that makes a difference."""

LOSS = "algorithms/test_policy_loss.py::test_value_and_gradient_follow_the_paper"
STEP = "training/test_step_matches_hf.py::test_step_equals_reference"
CLIENT = "sglang/test_sglang_client.py"
SYNC = "weights/test_weight_sync_servers.py::test_servers_get_the_policys_weights"
OPTIMIZER = "checkpoint/test_checkpoint_writer.py::test_optimizer_settings_of_a_resumed_run_are_its_own"
CHECKPOINTS = "checkpoint/test_checkpoint_resume.py::test_latest"
EXPORTS = "checkpoint/test_checkpoint_resume.py::test_exports_between"
WRITTEN = "driver/test_dapo_run.py::test_what_is_written_is_what_is_documented"
EVALUATE = "evaluation/test_evaluate_command.py::test_the_command_writes_a_table_and_json"
INSTRUCTION = "driver/test_bad_input.py::test_training_and_heldout_prompts_have_their_own_instruction"
TESTS: dict[str, str] = {
    "output_dir": "driver/test_run.py::test_a_used_directory_is_refused",
    "model.dtype": "planning/test_planning_activations.py::test_saved_bytes_equal_a_forward_pass",
    "model.kernels": "driver/test_device.py::test_kernels_are_chosen_once_and_say_why",
    "model.recompute": "planning/test_planning_activations.py::test_saved_bytes_equal_a_forward_pass",
    "model.attention": "model/test_gpu_choices.py::test_kernels_of_an_installed_package_are_chosen",
    "model.reference": "model/test_gpu_choices.py::test_where_the_reference_lies",
    "model.routing_replay": "training/test_routing_replay.py::test_experts_of_the_engine",
    "data.filter": "data/test_data_prompts.py::test_a_filter_sees_the_columns_and_says_what_it_dropped",
    "data.instruction": INSTRUCTION,
    "data.date": "data/test_data_today.py::test_a_date_that_is_set_is_the_date",
    "rollout.temperature": STEP,
    "rollout.batch_size": EVALUATE,
    "rollout.dynamic_sampling": "rollout/test_sampling.py::test_without_it_groups_are_what_was_drawn",
    "rollout.leftover": "rollout/test_sampling.py::test_leftover_is_learned_from_first",
    "rollout.sglang.max_concurrency": f"{CLIENT}::test_no_more_samples_are_in_flight_than_max_concurrency",
    "rollout.sglang.start_timeout_s": f"{CLIENT}::test_a_server_has_its_start_timeout",
    "rollout.sglang.request_timeout_s": f"{CLIENT}::test_an_answer_has_the_request_timeout",
    "rollout.sglang.health_timeout_s": "sglang/test_sglang_engine.py::test_a_killed_server",
    "rollout.sglang.retry_timeout_s": "sglang/test_sglang_engine.py::test_no_server_left",
    "weight_sync.method": SYNC,
    "weight_sync.bucket_mb": SYNC,
    "weight_sync.path": SYNC,
    "weight_sync.delta": "weights/test_weight_sync_layouts.py::test_servers_of_two_sizes",
    "weight_sync.timeout_s": "weights/test_weight_sync_scripted.py::test_a_request_of_a_sync_has_its_timeout",
    "weight_sync.keep_files": "weights/test_weight_sync_servers.py::test_a_restarted_server_needs_the_files",
    "reward.verifier": "driver/test_bad_input.py::test_setting",
    "reward.answer": "driver/test_bad_input.py::test_what_is_said_of_truths_and_styles",
    "reward.overlong_penalty": "algorithms/test_overlong_penalty.py::test_is_the_papers",
    "reward.overlong_buffer": "algorithms/test_overlong_penalty.py::test_is_the_papers",
    "bicc.enabled": STEP,
    "bicc.denominator": STEP,
    "bicc.weight": STEP,
    "loss.objective": LOSS,
    "loss.clip_high": LOSS,
    "loss.dual_clip": LOSS,
    "loss.aggregation": STEP,
    "loss.entropy_coefficient": "algorithms/test_policy_loss.py::test_the_entropy_bonus_lowers_the_loss",
    "loss.load_balancing_coefficient": STEP,
    "loss.z_loss_coefficient": STEP,
    "parallel.heartbeat_timeout_s": "driver/test_two_hosts.py::test_a_cut_cable_is_named_on_both_sides",
    "optimizer.beta1": OPTIMIZER,
    "optimizer.beta2": OPTIMIZER,
    "optimizer.eps": OPTIMIZER,
    "optimizer.weight_decay": "model/test_policy_optimizer.py::test_weight_decay_spares_norms_and_biases",
    "optimizer.clip_grad": STEP,
    "evaluation.every": WRITTEN,
    "evaluation.samples": EVALUATE,
    "evaluation.temperature": "evaluation/test_evaluation.py::"
    "test_answers_are_sampled_at_the_temperature_of_evaluations",
    "checkpoint.every": CHECKPOINTS,
    "checkpoint.keep": CHECKPOINTS,
    "checkpoint.resume": "driver/test_run.py::test_resumed_run_equals_one_that_was_not_stopped",
    "checkpoint.force": "checkpoint/test_checkpoint_resume.py::test_dangerous_settings_are_refused_by_name",
    "export.every": EXPORTS,
    "export.keep": EXPORTS,
    "monitoring.tensorboard": "driver/test_metric_files.py::"
    "test_tensorboard_has_every_scalar_and_forgets_on_truncation",
    "monitoring.wandb_project": "driver/test_cli_validation.py::test_missing_wandb_is_named",
    "monitoring.report_groups": "training/test_report_records.py::"
    "test_groups_without_contrast_move_no_figure_of_those_with",
    "monitoring.reference": "algorithms/test_step_advantages.py::"
    "test_the_reference_is_computed_where_it_is_needed_or_asked_for",
}
"""The test of a setting that shows in a run, with servers or over several hosts. Checked here: the package
reads the setting, the test is there and it, or what it uses, names the setting."""


def test_every_setting_is_shown_once():
    assert sorted([*CHANGES, *TESTS]) == sorted(settings())


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_something(name: str, tmp_path: Path):
    shown, given, value = CHANGES[name]
    if settings()[name].is_mapping:
        inner, _, value = value.partition(": ")
        changed = f"{name}.{inner}={value}"
    else:
        changed = f"{name}={value}"
    before, after = (shown(parse_config([*given, *more]), tmp_path) for more in ([], [changed]))
    assert before == shown(parse_config(given), tmp_path)
    assert before != after
    if shown is refusal and name != "dry_run":
        assert before == "" and (name in after or name == "rollout.engine")


@pytest.fixture(scope="module")
def read_names() -> set[str]:
    """Returns every attribute and keyword that the package reads outside config.py."""
    found = set()
    for path in (REPOSITORY / "megatron_bicc").rglob("*.py"):
        if path.name != "config.py":
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            found |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return found


@pytest.mark.parametrize(("name", "test"), TESTS.items())
def test_a_setting_is_read_and_its_test_is_there(name: str, test: str, read_names: set[str]):
    last = name.rpartition(".")[2]
    assert last in read_names, "no module reads it"
    file, _, function = test.partition("::")
    path = REPOSITORY / "tests" / file
    assert path.is_file(), f"name another test of {name}: {file} is gone"
    helpers = [*path.parent.glob("*.py"), *(REPOSITORY / "tests/support").glob("*.py")]
    named = any(last in helper.read_text(encoding="utf-8") for helper in helpers)
    assert named, f"name another test of {name}: {file} and what it uses do not name it"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions, f"name another test of {name}: {file} has no {function}"


def outside(setting: Setting) -> list[Any]:
    """Returns values of the setting's type just outside of what its field accepts."""
    rule, found = setting.rule, []
    step = 1 if setting.type in (int, int | None) else 1e-6
    found += [] if rule.at_least is None else [rule.at_least - step]
    found += [] if rule.above is None else [rule.above, rule.above - step] if rule.above else [0, -step]
    found += [] if rule.at_most is None else [rule.at_most + step]
    found += [] if rule.below is None else [rule.below, rule.below + step]
    if setting.type in (float, float | None):
        found += [math.nan, math.inf, -math.inf]
    if setting.type in (str, str | None):
        found += ["a\0b"]
    free = {int, int | None, float, float | None, str, str | None, bool, bool | None}
    if rule.named or rule.form or setting.type not in free:
        found += ["neither"]
    return found


CONSTRAINED = [(name, value) for name, setting in settings().items() for value in outside(setting)]


@pytest.mark.parametrize(("name", "value"), CONSTRAINED)
def test_a_value_out_of_range_is_refused_with_name_value_and_remedy(name: str, value: Any):
    with pytest.raises(UserError) as refusal:
        settings()[name].check(value)
    line = str(refusal.value)
    shown = repr(value) if isinstance(value, str) else str(value)
    assert line.startswith(f"{name} is {shown}; it must ")
    assert "\n" not in line and not line.rstrip().endswith("it must be")


def test_settings_with_a_range_are_among_them():
    ranged = {name for name, setting in settings().items() if setting.rule.remedy}
    assert ranged <= {name for name, _ in CONSTRAINED}
    assert len(ranged) > 40


@pytest.mark.parametrize("name", settings())
def test_a_default_and_the_edges_of_a_range_are_accepted(name: str):
    setting = settings()[name]
    setting.check(setting.default)
    for edge in (setting.rule.at_least, setting.rule.at_most):
        if edge is not None:
            setting.check(edge)
    if setting.rule.zero_is_off:
        setting.check(0)


TABLES = {
    "reward.verifier": BUILT_INS,
    "rollout.engine": ENGINES,
    "loss.objective": OBJECTIVES,
    "loss.baseline": BASELINES,
}
"""The built-ins of each setting that takes a name or an import path; data.filter has none"""


def test_the_names_of_a_setting_are_those_of_its_built_ins():
    named = {name: setting.rule.named for name, setting in settings().items() if any(setting.rule.named)}
    assert named == {name: tuple(table) for name, table in TABLES.items()}
