"""Tests avg@k and pass@k against their definitions, the file of answers, and the benchmarks' columns."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted import Words, score

from megatron_bicc.config import Config, EvaluationConfig
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.data.rows import read_question, read_rows
from megatron_bicc.errors import UserError
from megatron_bicc.evaluate import Benchmark, EvaluationInputs, evaluate_benchmarks
from megatron_bicc.evaluation.benchmarks import (
    AnswerFile,
    Answers,
    names_of,
    pass_at_k,
    run_benchmark,
    summarize,
    write_results,
)
from megatron_bicc.rewards import math_reward
from megatron_bicc.rollout.types import Request, Sample, Sampling
from megatron_bicc.train import Trainer


def enumerated(samples: int, correct: int, k: int) -> float:
    """Share of the subsets of k samples that hold a right one."""
    right = [i < correct for i in range(samples)]
    chosen = list(itertools.combinations(right, k))
    return sum(any(subset) for subset in chosen) / len(chosen)


def answers(index: int, rewards: list[float]) -> Answers:
    n = len(rewards)
    return Answers(index, rewards, [3] * n, [False] * n, ["\\boxed{1}"] * n)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for samples in range(1, 9):
        counts = np.arange(samples + 1)
        for k in range(1, samples + 1):
            expected = [enumerated(samples, c, k) for c in counts]
            np.testing.assert_allclose(pass_at_k(samples, counts, k), expected, atol=1e-14)


def test_pass_at_k_of_many_samples_neither_overflows_nor_leaves_its_range() -> None:
    """Against exact integers; C(4096, 2048) has 1232 digits."""
    for samples, correct, k in ((4096, 1, 2048), (4096, 3, 17), (10_000, 9_999, 1), (10_000, 1, 9_999)):
        missed = math.comb(samples - correct, k) * 10**30 // math.comb(samples, k) / 10**30
        assert pass_at_k(samples, np.array([correct]), k)[0] == pytest.approx(1 - missed, abs=1e-12)


@pytest.mark.parametrize(
    ("correct", "k", "complaint"), [(1, 0, "pass@0"), (1, 5, "pass@5"), (5, 2, "0 and 4")]
)
def test_pass_at_k_refuses_what_it_is_not_defined_for(correct: int, k: int, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        pass_at_k(4, np.array([correct]), k)


def test_the_figures_of_a_benchmark() -> None:
    rewards = [[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0.4, 0.6, 0, 0, 0]]
    result = summarize([answers(i, row) for i, row in enumerate(rewards)], threshold=0.5)
    share = np.array([3, 0, 2]) / 6
    assert (result.prompts, result.samples, list(result.pass_at)) == (3, 6, [1, 2, 4, 6])
    assert result.avg.value == result.pass_at[1].value == pytest.approx(share.mean())
    assert result.avg.standard_error == pytest.approx(share.std(ddof=1) / math.sqrt(3))
    for k in (2, 4, 6):
        expected = np.mean([enumerated(6, c, k) for c in (3, 0, 2)])
        assert result.pass_at[k].value == pytest.approx(expected)
    assert (result.length, result.truncated) == (3, 0)


def test_results_are_written_for_people_and_programs(tmp_path: Path) -> None:
    one = summarize([answers(0, [1, 0])], threshold=0.5)
    two = summarize([answers(0, [1, 1]), answers(1, [0, 1])], threshold=0.5)
    table = write_results(tmp_path, {"seed": 1}, {"one": one, "two": two})
    assert table == (tmp_path / "results.md").read_text()
    assert "| benchmark | prompts | avg@2 | pass@2 | tokens | truncated |" in table
    assert "| one | 1 | 50.0 | 100.0 | 3 | 0.0% |" in table
    assert "| two | 2 | 75.0 ± 25.0 | 100.0 ± 0.0 | 3 | 0.0% |" in table
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["benchmarks"]["one"]["avg"] == {"value": 0.5, "standard_error": None}
    assert record["benchmarks"]["two"]["pass_at_2"] == {"value": 1.0, "standard_error": 0.0}


PROMPTS = [Prompt(i, [], np.array([1], np.int32), "1", "", {}) for i in range(5)]


class Engine:
    """Test double for asking a policy: answers as they depend on the whole batch, and counts the batches."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.dies_at = dies_at

    def __call__(self, prompts: list[Prompt]) -> list[Answers]:
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append([prompt.index for prompt in prompts])
        return [answers(p.index, [1 / 3 + sum(self.batches[-1]) / 7, p.index]) for p in prompts]


def run(path: Path, engine: Engine) -> list[Answers]:
    return run_benchmark("b", PROMPTS, engine, AnswerFile(path, {"seed": 1}), prompts_at_once=2)


@pytest.mark.usefixtures("single_process")
def test_a_killed_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl", Engine())
    path = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, Engine(dies_at=2))
    # the second batch was cut off behind its first prompt, in the middle of a line
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join(content[:-1]) + content[-1][:10])
    again = Engine()
    assert run(path, again) == whole
    assert again.batches == [[2, 3], [4]]
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    finished = Engine()
    assert run(path, finished) == whole
    assert finished.batches == []


def test_answers_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    first = AnswerFile(path, {"seed": 1, "k": 2})
    assert first.load() == {} and not path.exists()  # a start that fails leaves nothing behind
    first.append([Answers(0, [1.0], [3], [False], ["2"])])
    assert list(AnswerFile(path, {"seed": 1, "k": 2}).load()) == [0]
    with pytest.raises(UserError, match="b.jsonl: made with other settings: k was 2, is 4; set them back"):
        AnswerFile(path, {"seed": 1, "k": 4}).load()
    with path.open("a") as file:
        file.write('{"index": 0}\n')
    with pytest.raises(UserError, match="b.jsonl, line 3: not an answer; remove the line"):
        AnswerFile(path, {"seed": 1, "k": 2}).load()


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [str(tmp_path / p) for p in ("math/test.jsonl", "aime/test.jsonl", "amc.parquet")]
    assert list(names_of(paths)) == ["math_test", "aime_test", "amc"]
    with pytest.raises(UserError, match="would be named math_test too"):
        names_of([paths[0], str(tmp_path / "math/test.parquet")])


BENCHMARKS = {
    "MATH-500": (
        "test.jsonl",
        {
            "problem": "Convert the point $(0,3)$ to polar coordinates.",
            "solution": r"So it is $\boxed{\left( 3, \frac{\pi}{2} \right)}.$",
            "answer": r"\left( 3, \frac{\pi}{2} \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        r"\left(3,\frac{\pi}2\right)",
    ),
    "AMC 2023, math-ai": (
        "test.parquet",
        {"id": 0, "question": "How far is it?", "answer": "27", "url": "https://example.org"},
        "27",
    ),
    "AMC 2022 and 2023, AI-MO": (
        "test.parquet",
        {"id": 0, "problem": "How far is it?", "answer": 27.0, "url": "https://example.org"},
        "27",
    ),
    "AIME 2024, HuggingFaceH4": (
        "test.parquet",
        {
            "id": 60,
            "problem": "Count them.",
            "solution": r"There are $\boxed{033}$.",
            "answer": "033",
            "url": "https://example.org",
            "year": "2024",
        },
        "33",
    ),
    "AIME 2024, Maxwell-Jia": (
        "test.parquet",
        {"ID": "2024-II-4", "Problem": "Count them.", "Solution": "It is 33.", "Answer": 33},
        "033",
    ),
    "AIME 2024, math-ai": (
        "test.parquet",
        {"id": 60, "problem": "Count them.", "solution": r"\boxed{33}", "url": "https://example.org"},
        "33",
    ),
    "AIME 2025, math-ai": ("test.jsonl", {"problem": "Count them.", "answer": "70", "id": "0"}, "70"),
    "AIME 2025, opencompass": (
        "test.jsonl",
        {"question": "Find the arc in degrees.", "answer": "336^\\circ"},
        "336",
    ),
}
"""Name: (file, a row in the published columns and types, a right answer as a policy may write it)"""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_published_format_of_a_benchmark(name: str, tmp_path: Path) -> None:
    file, row, answer = BENCHMARKS[name]
    path = tmp_path / file
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    [(_, found)] = read_rows(path)
    question = read_question(found, instruction="\nBox it.")
    asked = row.get("problem") or row.get("Problem") or row.get("question")
    assert question.messages == [{"role": "user", "content": f"{asked}\nBox it."}]
    texts = [rf"So \boxed{{{answer}}}", r"So \boxed{71}"]
    assert math_reward.score(texts, [question.ground_truth] * 2).tolist() == [1.0, 0.0]


class Recording:
    """Test double of a rollout engine: always answers 1, and keeps the temperatures it was asked for."""

    def __init__(self) -> None:
        self.temperatures: list[float] = []

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        self.temperatures += [sampling.temperature] * len(requests)
        tokens = np.array([1, 9], np.int32)
        return [Sample(tokens, np.zeros(2, np.float32), "stop", 0) for _ in requests]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.usefixtures("single_process")
def test_answers_are_sampled_at_the_temperature_of_evaluations(
    temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During training and by the command; rollout.temperature is another one."""
    settings = EvaluationConfig(temperature=temperature, samples=2)
    config = Config(output_dir=str(tmp_path), evaluation=settings)
    config.rollout.temperature = 0.7
    config.model.path = str(Path(__file__).parents[2] / "examples/tiny_policy")
    engine = Recording()
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.engine = config, engine
    trainer.inputs = SimpleNamespace(heldout=PROMPTS, verifier=score, tokenizer=Words())
    trainer.evaluate()
    assert engine.temperatures == [temperature] * 2 * len(PROMPTS)
    monkeypatch.setattr("megatron_bicc.evaluate.make_engine", lambda *_: engine)
    benchmarks = {"b": Benchmark(__file__, PROMPTS)}
    evaluate_benchmarks(EvaluationInputs(config, Words(), score, benchmarks))
    assert engine.temperatures == [temperature] * 4 * len(PROMPTS)
