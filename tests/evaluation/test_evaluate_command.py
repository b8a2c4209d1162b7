"""Tests python -m megatron_bicc.evaluate on the tiny policy: figures, a kill, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
from support import warm

from megatron_bicc.cli import parse_config
from megatron_bicc.evaluate import evaluate_benchmarks, main, read_inputs
from megatron_bicc.evaluation.benchmarks import Evaluation

REPOSITORY = Path(__file__).parents[2]
MODEL, HELD_OUT = REPOSITORY / "examples/tiny_policy", REPOSITORY / "examples/data/heldout.parquet"
SETTINGS = [
    f"model.path={MODEL}",
    "model.dtype=float32",
    "rollout.max_new_tokens=32",
    "rollout.batch_size=16",
]
SETTINGS += ["data.max_prompt_tokens=32", "evaluation.prompts=10", "evaluation.samples=4"]


@pytest.mark.usefixtures("single_process")
def test_a_killed_evaluation_ends_with_the_same_answers(tmp_path: Path) -> None:
    def evaluate(out: str) -> Evaluation:
        config = parse_config([*SETTINGS, f"output_dir={tmp_path / out}"])
        return evaluate_benchmarks(read_inputs(config, [str(HELD_OUT)]))["heldout"]

    whole = evaluate("whole")
    assert (whole.prompts, whole.samples) == (10, 4)
    assert 0.2 < whole.avg.value < 0.8  # the tiny policy is right about half the time
    assert whole.avg.value < whole.pass_at[2].value < whole.pass_at[4].value
    answers = (tmp_path / "whole/heldout.jsonl").read_bytes()
    lines = answers.splitlines(keepends=True)
    assert len(lines) == 11
    (tmp_path / "killed").mkdir()
    # settings, one whole batch of four prompts, one prompt of the second, half a line
    (tmp_path / "killed/heldout.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:40])
    assert evaluate("killed") == whole
    assert (tmp_path / "killed/heldout.jsonl").read_bytes() == answers


def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    rows = [{"problem": f"{a}+8-6=", "answer": a + 2, "id": str(a)} for a in range(11, 17)]
    benchmark = tmp_path / "aime25.jsonl"
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "megatron_bicc.evaluate", "--model", MODEL, "--benchmark", benchmark, "--k", "3"]
    command += ["--out", tmp_path / "out", "model.dtype=float32", "rollout.max_new_tokens=32"]
    done = warm.run(command, timeout_s=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| benchmark | prompts | avg@3 | pass@2 | pass@3 | tokens | truncated |" in done.stdout
    assert "aime25: 100%" in done.stderr
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["settings"]["evaluation.samples"] == 3
    kept = [json.loads(line) for line in (tmp_path / "out/aime25.jsonl").read_text().splitlines()[1:]]
    right = sum(reward for line in kept for reward in line["rewards"])
    assert record["benchmarks"]["aime25"]["avg"]["value"] == pytest.approx(right / 18)
    # every reward is what the text deserves
    for line, row in zip(kept, rows, strict=True):
        assert line["rewards"] == [float(f"\\boxed{{{row['answer']}}}" in text) for text in line["texts"]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--benchmark", "x.jsonl"], "the following arguments are required: --model"),
        (["--model", "nowhere", "--benchmark", "BAD"], "model.path is nowhere; there is no Hugging Face"),
        (["--model", str(MODEL), "--benchmark", "absent.jsonl"], "--benchmark is absent.jsonl; there is no"),
        (
            ["--model", str(MODEL), "--benchmark", "BAD"],
            "bad.jsonl, row 2: unknown schema, columns found: a, q",
        ),
        (["--model", str(MODEL), "--benchmark", "BAD", "--k", "many"], "--k is many; it must be"),
        (["--model", str(MODEL), "--benchmark", "BAD", "--k", "0"], "--k is 0; it must be"),
        (["--model", str(MODEL), "--benchmark", "BAD", "evaluation.samples=2"], "give --k instead"),
        (["--model", str(MODEL), "--benchmark", "BAD", "--dry-run"], "dry_run is not a setting"),
        (["--model", str(MODEL), "--benchmark", "BAD", "output_dir=x"], "give --out instead"),
        (["--model", str(MODEL), "--benchmark", "BAD", "reward.threshold=-1"], "reward.threshold is -1"),
        (["--model", str(MODEL), "--benchmark", "BAD", "evaluation.temprature=1"], "unknown setting"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"problem": "1+1=", "answer": 2}\n{"q": "1+1=", "a": 2}\n')
    assert complaint in mistake(
        [str(bad) if argument == "BAD" else argument for argument in arguments], capsys
    )


def mistake(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The line that ends the command."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m megatron_bicc.evaluate: error: ")
    return line


def test_a_model_without_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path)
    line = mistake(["--model", str(tmp_path), "--benchmark", str(HELD_OUT)], capsys)
    assert f"model.path is {tmp_path}; its tokenizer encodes any text to no tokens" in line


def test_logs_of_servers_lie_beside_the_answers(tmp_path: Path) -> None:
    """The program is no server and ends at once."""
    config = tmp_path / "training.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/training\nrollout: {{engine: sglang, max_new_tokens: 32, "
        "sglang: {python: 'false'}}\n"
    )
    command = ["-m", "megatron_bicc.evaluate", "--model", MODEL, "--benchmark", HELD_OUT, "--k", "1"]
    done = warm.run([*command, "--out", tmp_path / "out", "--config", config], timeout_s=280)
    assert done.returncode == 2
    [log] = (tmp_path / "out/servers").glob("*.log")
    assert f"ended during its start, see {log}" in done.stderr
    assert not (tmp_path / "training").exists()
