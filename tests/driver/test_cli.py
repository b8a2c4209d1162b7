"""Tests the command line: precedence, types, and one line for every mistake."""

import socket
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_bicc.cli import parse_config
from megatron_bicc.config import RENAMED, Config, LossConfig, OptimizerConfig, settings
from megatron_bicc.errors import abort


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def error_line(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line on stderr of a command line that must be refused."""
    with pytest.raises(SystemExit) as stop:
        parse_config(list(argv))
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_defaults_are_those_of_config():
    assert parse_config([]) == Config()


@pytest.mark.parametrize(
    "argv",
    [["rollout.group_size=4"], ["--rollout.group_size=4"], ["--rollout.group_size", "4"]],
    ids=["bare", "equals", "space"],
)
def test_three_ways_to_override(argv: list[str]):
    assert parse_config(argv) == replace(Config(), rollout=replace(Config().rollout, group_size=4))


def test_yaml_is_read_and_overrides_win_wherever_they_stand(yaml_file):
    path = yaml_file("optimizer:\n  lr: 1e-6\n  eps: 1e-7\nseed: 5\n")
    for argv in (["optimizer.lr=2e-5", "--config", path], ["--config", path, "optimizer.lr=2e-5"]):
        config = parse_config(argv)
        assert config.optimizer == OptimizerConfig(lr=2e-5, eps=1e-7)
        assert config.seed == 5


def test_exponent_without_a_dot_is_a_float_in_yaml(yaml_file):
    lr = parse_config(["--config", yaml_file("optimizer:\n  lr: 1e-6\n")]).optimizer.lr
    assert lr == 1e-6 and isinstance(lr, float)


def test_null_and_text_keep_their_meaning(yaml_file):
    config = parse_config(
        [
            "--config",
            yaml_file('bicc:\n  enabled: null\n  wrong_header: "\\n\\nno:\\n"\nloss:\n'),
            "model.path=12",
        ]
    )
    assert config.bicc.enabled is None
    assert config.bicc.wrong_header == "\n\nno:\n"
    assert config.model.path == "12"
    assert config.loss == LossConfig()


@hypothesis.settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_text_settings_take_any_text(text: str):
    assert parse_config([f"bicc.answer_header={text}"]).bicc.answer_header == text


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["rollout.group_sze=3"], ["command line", "rollout.group_sze", "did you mean rollout.group_size"]),
        (["--rolout.temperature=3"], ["rolout.temperature", "did you mean rollout.temperature"]),
        (["rollout.top_p=0.9"], ["no setting rollout.top_p", "whole distribution"]),
        (["rollout.sglang.top_k=5"], ["no setting rollout.sglang.top_k", "rollout.temperature"]),
        (["min_p=0"], ["no setting min_p"]),
        (["parallel.silence_seconds=9"], ["is now called parallel.heartbeat_timeout_s"]),
        (["megatron.dpp.bucket_size=3"], ["megatron.dpp.bucket_size", "mean megatron.ddp.bucket_size?"]),
        (["megatron.dpp=3"], ["unknown setting megatron.dpp", "did you mean megatron.ddp?"]),
        (["=3"], ["command line: unknown setting ''"]),
        (["rollout.a\nb=3"], ["command line: unknown setting 'rollout.a\\nb'"]),
        (["lr=3"], ["unknown setting lr", "did you mean optimizer.lr"]),
        (["rollout.group_size=x"], ["rollout.group_size is 'x'", "a whole number"]),
        (["rollout.group_size=4.5"], ["rollout.group_size is '4.5'", "a whole number"]),
        (["optimizer.lr=fast"], ["optimizer.lr is 'fast'", "a number"]),
        (["parallel.sequence=maybe"], ["parallel.sequence is 'maybe'", "true or false"]),
        (["model.dtype=int8"], ["model.dtype is 'int8'", "float32 or bfloat16"]),
        (["loss.clip_low=q"], ["loss.clip_low is 'q'", "a number at least 0 or null"]),
        (["seed=7000000000"], ["command line: seed is 7000000000", "less than 2147483648"]),
        (["model.dtype=bfloat"], ["model.dtype is 'bfloat'", "did you mean bfloat16?"]),
        (["seed=1", "loss.advantage=q"], ["loss.advantage is 'q'", "normalized, centered or null"]),
        (["rollout=3"], ["rollout is a section"]),
        (["--train.steps"], ["train.steps has no value"]),
        (["--train.steps", "--seed=1"], ["train.steps has no value"]),
        (["--config", "/nowhere/a.yaml"], ["/nowhere/a.yaml", "No such file"]),
        (["--config", "/"], ["--config /", "directory"]),
        (["algorithm=dap", "--print-config"], ["command line: algorithm is 'dap'", "did you mean dapo?"]),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv: list[str], parts: list[str]):
    line = error_line(capsys, *argv)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rollout:\n  group_sze: 4\n", ["line 2", "rollout.group_sze", "did you mean rollout.group_size"]),
        ("rollout:\n  top_p: 0.9\n", ["line 2", "no setting rollout.top_p", "whole distribution"]),
        ("rolout:\n  group_size: 4\n", ["line 2", "rolout.group_size", "did you mean rollout.group_size"]),
        (
            "seed: 1\nrollout:\n  engine: vllm\n",
            ["line 3", "rollout.engine is 'vllm'", "it must be local, sglang or"],
        ),
        ("rollout:\n  engine: sglan\n", ["line 2", "rollout.engine is 'sglan'", "did you mean sglang?"]),
        ("data:\n  filter: mine\n", ["line 2", "data.filter is 'mine'", "empty or an import path"]),
        ("loss:\n  baseline: men\n", ["line 2", "loss.baseline is 'men'", "did you mean mean?"]),
        ("reward:\n\n  verifier: mth\n", ["line 3", "reward.verifier is 'mth'", "did you mean math?"]),
        ("algorithm: gpro\n", ["line 1", "algorithm is 'gpro'", "did you mean grpo?"]),
        ("train:\n  steps: 0\n", ["line 2", "train.steps is 0", "at least 1"]),
        ("rollout: 5\n", ["line 1", "rollout is a section"]),
        ("train:\n  steps: [1, 2]\n", ["line 2", "train.steps takes one value"]),
        ("train:\n  steps: {a: 1}\n", ["line 2", "train.steps takes one value"]),
        ("train:\n  steps:\n", ["line 2", "train.steps is empty", "a whole number"]),
        ("seed: 1\nseed: 2\n", ["line 2", "seed is given twice"]),
        ("rollout: [\n", ["line 2", "not YAML"]),
        ("a: b: c\n", ["line 1", "not YAML"]),
        ("just text\n", ["contains no settings"]),
    ],
)
def test_mistakes_in_yaml_name_file_and_line(capsys, yaml_file, text: str, parts: list[str]):
    path = yaml_file(text)
    line = error_line(capsys, "--config", path)
    assert path in line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "argument",
    [
        "seed=" + "9" * 5000,
        "loss.clip_low=" + "[" * 1000,
        "model.dtype=" + "x" * 100_000,
        "x" * 100_000 + "=1",
    ],
)
def test_a_long_name_or_value_is_shortened(capsys, argument: str):
    assert len(error_line(capsys, argument)) < 300


def test_binary_file_is_refused(capsys, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert "not UTF-8" in error_line(capsys, "--config", str(path))


def leaves(section: type) -> int:
    return sum(leaves(f.type) if is_dataclass(f.type) else 1 for f in fields(section))


def test_help_shows_every_setting_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # a line may end at a hyphen
    assert len(settings()) == leaves(Config)
    for name, setting in settings().items():
        assert (f"--{name}.NAME VALUE" if setting.is_mapping else f"--{name} ") in words
        assert " ".join(setting.usage.split()).replace("- ", "-") in words
        assert all(choice in words for choice in setting.choices)
    assert "a context takes. [within 0 and 1; default 0.4]" in words
    assert "--rollout.engine local|sglang|module:name" in words


def test_printed_config_is_resolved_and_reads_back(capsys, yaml_file, tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        parse_config(["algorithm=dapo+bicc", "optimizer.lr=3e-7", "--print-config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["loss"]["clip_high"] == 0.28
    config = parse_config(["--config", yaml_file(printed)])
    assert config.bicc.enabled is True and config.rcc.enabled is False
    assert config.optimizer.lr == 3e-7
    assert config.bicc.wrong_header == Config().bicc.wrong_header


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_ends_at_once_and_the_others_after_torchrun_could_kill_them(monkeypatch, capsys, rank: str):
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as stop:
        abort("two\nlines")
    assert stop.value.code == 2
    place = "" if rank == "0" else f"process 1 on host {socket.gethostname()}: "
    assert capsys.readouterr().err == f"python -m megatron_bicc.train: error: {place}two lines\n"
    assert waited == ([] if rank == "0" else [2.0])


@pytest.mark.parametrize("spelling", [["--dry-run"], ["--dry_run"], ["--dry_run", "true"], ["dry_run=true"]])
def test_spellings_of_a_dry_run(spelling: list[str]):
    config = parse_config([*spelling, "seed=5"])
    assert config.dry_run and config.seed == 5


def test_parsing_needs_no_torch():
    code = "import sys, megatron_bicc.cli as cli; cli.parse_config([]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.parametrize("former", RENAMED)
def test_a_former_name_is_an_error_that_gives_the_present_one(capsys, yaml_file, former: str):
    present = RENAMED[former]
    section, _, name = former.rpartition(".")
    nested = "".join(f"{'  ' * i}{part}:\n" for i, part in enumerate(section.split(".")))
    path = yaml_file(f"{nested}{'  ' * former.count('.')}{name}: 1\n")
    expected = f"{former} is now called {present}; rename it\n"
    assert error_line(capsys, f"{former}=1").endswith(f"command line: {expected}")
    assert error_line(capsys, "--config", path).endswith(f"{path} line {former.count('.') + 1}: {expected}")
    assert former not in settings() and present in settings()


def test_text_that_yaml_would_read_as_something_else_stays_text(yaml_file):
    config = parse_config(
        ["--config", yaml_file("data:\n  date: 2025-01-31\nmodel:\n  path: on\noutput_dir: 12\n")]
    )
    assert (config.data.date, config.model.path, config.output_dir) == ("2025-01-31", "on", "12")
