"""Tests mistakes in a run's settings or files: one line that names it, exit status 2, before training."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_bicc.checkpoint.checkpoint import PROGRESS, Progress
from megatron_bicc.cli import parse_config
from megatron_bicc.startup import read_inputs
from megatron_bicc.train import main

REPOSITORY = Path(__file__).parents[2]
GOOD_ROW = {"prompt": "1+1=", "answer": "2"}

SETTINGS = {
    "rollout.grup_size=4": "unknown setting rollout.grup_size; did you mean rollout.group_size?",
    "rollout.group_size=many": "command line: rollout.group_size is 'many'; it must be a whole number",
    "rollout.group_size=1": "rollout.group_size is 1; it must be within 2 and 1048576",
    "algorithm=gropo": "algorithm is 'gropo'; did you mean grpo?",
    "data.train=nowhere.jsonl": "data.train is nowhere.jsonl; there is no such file",
    "data.train=/etc": "data.train is /etc; it is a directory, give one .parquet or .jsonl file",
    "model.path=nowhere": "model.path is nowhere; there is no Hugging Face config.json",
    "train.max_tokens_per_microbatch=100": "train.max_tokens_per_microbatch is 100; it must hold",
    "train.max_sequence_tokens=50": "train.max_sequence_tokens is 50; it must be at least",
    "parallel.tensor=2": "must divide the number of processes, 1",
    "parallel.context=2": "their product 2 must divide the number of processes, 1",
    "bicc.weight=1.5": "bicc.weight is 1.5; it must be within 0 and 1",
    "reward.threshold=-0.1": "reward.threshold is -0.1; reward.verifier=math gives 0 to an empty response",
    "reward.verifier=maths": "it must be math or an import path, module:name; did you mean math?",
    "rollout.prompts_per_step=9": "rollout.prompts_per_step=9 must be within 1 and the number of prompts",
    "seed=-1": "seed is -1; it must be at least 0",
    "output_dir=": "output_dir is empty",
    "output_dir=/etc/hostname/x": "'/etc/hostname' is not a writable directory",
    f"output_dir={'x' * 300}": "it cannot be a directory",
    "data.max_prompt_tokens=3": "row 1: the prompt has 6 tokens, over data.max_prompt_tokens=3",
}
ROWS = {
    "{not json": "row 2: ",
    json.dumps(GOOD_ROW | {"prompt": ""}): "row 2: ",
    json.dumps(GOOD_ROW | {"prompt": "1<|end|>"}): "row 2: the message of role 'user' has the control token",
    json.dumps({"prompt": "1+1="}): "row 2: ",
    json.dumps({"question": "1+1=", "answer": "one and one\nis two"}): "row 2: ",
    json.dumps({"text": "1+1="}): "row 2: ",
    json.dumps(GOOD_ROW | {"answer": "\\frac{1}{2"}): "row 2: no response can be correct",
    json.dumps(GOOD_ROW | {"answer": "NaN"}): "row 2: no response can be correct",
}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A run without mistakes on one process."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(GOOD_ROW) + "\n" for _ in range(8)))
    return [
        f"model.path={REPOSITORY / 'examples/tiny_policy'}",
        f"data.train={data}",
        f"output_dir={tmp_path / 'run'}",
        "data.max_prompt_tokens=64",
        "rollout.prompts_per_step=2",
        "rollout.max_new_tokens=64",
        "train.max_sequence_tokens=128",
        "train.max_tokens_per_microbatch=128",
        "dry_run=true",
    ]


def test_good_input_passes(arguments: list[str]) -> None:
    assert len(read_inputs(parse_config(arguments)).prompts) == 8


def test_training_and_heldout_prompts_have_their_own_instruction(arguments: list[str]) -> None:
    data = next(word for word in arguments if word.startswith("data.train"))
    own = ["data.instruction= Add.", "evaluation.instruction= Box it.", "data.control_tokens=keep"]
    inputs = read_inputs(parse_config([*arguments, data.replace("data.train", "evaluation.data"), *own]))
    asked = [inputs.tokenizer.decode(prompts[0].token_ids) for prompts in (inputs.prompts, inputs.heldout)]
    assert asked == ["<|user|>1+1= Add.<|assistant|>", "<|user|>1+1= Box it.<|assistant|>"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting(setting: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert SETTINGS[setting] in run([*arguments, setting], capsys)


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text(f"{json.dumps(GOOD_ROW)}\n{row}\n")
    line = run(arguments, capsys)
    assert str(tmp_path / "prompts.jsonl") in line
    assert ROWS[row] in line


def test_what_is_said_of_truths_and_styles(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "Write Answer: X.", "answer": text} for text in ["1234.", "180,", "See solution"]]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with caplog.at_level("INFO", logger="megatron_bicc"):
        read_inputs(parse_config([*arguments, "reward.answer=boxed"]))
    said = [
        record.getMessage() for record in caplog.records if record.name == "megatron_bicc.rewards.registry"
    ]
    text, styles, mismatch = [line.partition(": ")[2] for line in said]
    assert text == "1 of 3 ground truths are compared as text, such as 'See solution' in row 3"
    assert styles.startswith(
        "reward.answer=boxed; in the first 3 prompts, ground truths readable per answer style: boxed 3, "
        "answer_line 3"
    )
    assert mismatch.startswith("reward.answer is boxed, but the prompts ask for Answer: X")


def test_another_runs_directory(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert "it already contains a run" in run(arguments, capsys)


def test_unknown_setting_in_a_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("rollout:\n  grup_size: 4\n")
    line = run(["--config", str(tmp_path / "bad.yaml"), *arguments], capsys)
    assert f"{tmp_path / 'bad.yaml'} line 2: unknown setting rollout.grup_size" in line


def test_a_model_whose_parts_do_not_fit(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(REPOSITORY / "examples/tiny_policy", tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 264', '"vocab_size": 5'))
    line = run([*arguments, f"model.path={tmp_path / 'model'}"], capsys)
    assert "its tokenizer has 264 tokens, but vocab_size in config.json is 5" in line


def test_held_out_prompts_on_paper_without_training_prompts(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "1+1="}\n')
    line = run([*arguments, "data.train=", f"evaluation.data={tmp_path / 'heldout.jsonl'}"], capsys)
    assert f"{tmp_path / 'heldout.jsonl'}, row 1: " in line


@pytest.mark.parametrize(
    ("setting", "damage", "message"),
    [
        ("rollout.temperature=0.5", "", "differ from those of step 1: rollout.temperature: was 1.0, is 0.5"),
        ("train.steps=2", " ", f"{PROGRESS} is damaged"),
    ],
)
def test_what_a_run_would_not_go_on_from_is_found_on_paper(
    setting: str,
    damage: str,
    message: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = read_inputs(parse_config(arguments))
    saved = Progress(1, inputs.collector.state_dict(), {}, asdict(inputs.config), inputs.contents)
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    text = json.dumps(asdict(saved)).encode()
    (checkpoint / PROGRESS).write_bytes(text + damage.encode())
    described = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({PROGRESS: described}))
    assert message in run([*arguments, "checkpoint.resume=true", setting], capsys)
