"""Tests prompt files: every schema, and an error with file and row for every fault."""

import datetime
import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_bicc.data.prompts import Prompt, digest, load_prompts
from megatron_bicc.errors import UserError
from megatron_bicc.rewards import math_reward

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = [{"role": "user", "content": "1+1?"}]
SYSTEM = {"role": "system", "content": "Add."}
DAPO = {
    "data_source": "math_dapo",
    "prompt": USER,
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "x"},
}
GSM8K = {"question": "1+1?", "answer": "One and one.\n#### 2"}
MATH = {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{2}$."}
PLAIN = {"prompt": "1+1?", "answer": 2}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> list[Prompt]:
    return load_prompts(path, tokenizer, **{"max_prompt_tokens": 100, **settings})


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("row", "data_source", "extra"),
    [
        (DAPO, "math_dapo", {"ability": "MATH", "extra_info": {"index": "x"}}),
        (GSM8K, "", {}),
        (MATH, "", {"level": "Level 1", "type": "Algebra"}),
        (MATH | {"solution": "\\boxed{3}", "answer": "2"}, "", {"level": "Level 1", "type": "Algebra"}),
        (MATH | {"solution": "So $\\boxed 2$."}, "", {"level": "Level 1", "type": "Algebra"}),
        (MATH | {"solution": "So $\\fbox{2}$."}, "", {"level": "Level 1", "type": "Algebra"}),
        ({"problem": "1+1?", "answer": 2}, "", {}),
        (PLAIN, "", {}),
        ({"prompt": USER, "answer": "2"}, "", {}),
        (
            {
                "prompt": [USER[0] | {"content": [{"type": "text", "text": t} for t in ("1+", "1?")]}],
                "answer": "2",
            },
            "",
            {},
        ),
    ],
)
def test_every_schema_gives_the_same_prompt(tmp_path, tokenizer, suffix, row, data_source, extra):
    (prompt,) = load(write(tmp_path / f"data{suffix}", [row]), tokenizer)
    assert tokenizer.decode(prompt.token_ids) == "[user]1+1?[assistant]"
    assert prompt.token_ids.dtype == np.int32
    assert (prompt.index, prompt.messages, prompt.ground_truth) == (0, USER, "2")
    assert prompt.data_source == data_source
    assert {name: prompt.extra[name] for name in extra} == extra


def test_contents_are_joined_without_a_chat_template(tmp_path, tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    messages = [{"role": "system", "content": "Add."}, *USER]
    (prompt,) = load(write(tmp_path / "a.jsonl", [{"prompt": messages, "answer": "2"}]), plain)
    assert plain.decode(prompt.token_ids) == "Add.\n1+1?"


def test_blank_lines_are_skipped_but_counted(tmp_path, tokenizer):
    prompts = load(write(tmp_path / "a.jsonl", [PLAIN, "\n", PLAIN]), tokenizer)
    assert [p.index for p in prompts] == [0, 2]


def test_overlong_prompts_are_dropped_on_request(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [PLAIN | {"prompt": "x" * 90}, PLAIN])
    prompts = load(path, tokenizer, overlong="drop")
    assert [p.index for p in prompts] == [1]
    assert "dropped 1 of 2 prompts over 100 tokens" in caplog.text


def test_the_limit_itself_is_not_overlong(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [PLAIN])
    assert len(load(path, tokenizer, max_prompt_tokens=len("[user]1+1?[assistant]"))) == 1
    with pytest.raises(UserError, match="21 tokens, over data.max_prompt_tokens=20"):
        load(path, tokenizer, max_prompt_tokens=20)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json\n", "not valid JSON"),
        ("[" * 100_000 + "\n", "not valid JSON"),
        ("[1]\n", "a list, not a JSON object"),
        ({"text": "1+1?", "label": "2"}, "unknown schema, columns found: label, text"),
        (PLAIN | {"prompt": "  "}, "empty prompt"),
        (PLAIN | {"prompt": []}, "empty prompt"),
        (PLAIN | {"prompt": "\u200b\ufeff"}, "empty prompt"),
        (
            PLAIN | {"prompt": [{"role": "user|>1+1?<|assistant", "content": "2"}]},
            r"has the role 'user\|>1\+1\?<\|assistant'; write one word",
        ),
        (
            f'{{"prompt": "1+1?", "answer": {"1" * 5000}}}\n',
            "a whole number of 5000 digits; store it as a string",
        ),
        (PLAIN | {"prompt": None}, "list of messages"),
        (PLAIN | {"prompt": [{"role": "user"}]}, "list of messages"),
        (PLAIN | {"prompt": "x" * 90}, "over data.max_prompt_tokens=100"),
        (
            PLAIN | {"prompt": [*USER, {"role": "tool", "content": "x"}]},
            "refuses the messages: no tools here",
        ),
        (PLAIN | {"prompt": [SYSTEM]}, "empty prompt in .prompt.: no message of role 'user'"),
        (PLAIN | {"prompt": [SYSTEM, {"role": "user", "content": " "}]}, "of role 'user' has no text"),
        (PLAIN | {"prompt": [*USER, {"role": "assistant", "content": ""}]}, "'assistant' has no text"),
        (PLAIN | {"prompt": [USER[0] | {"content": [{"type": "image"}]}]}, "a part of type 'image'"),
        (PLAIN | {"prompt": [USER[0] | {"content": ["1+1?"]}]}, "a part of type 'str'"),
        (PLAIN | {"prompt": [*USER, {"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool_calls"),
        ('{"prompt": "\\ud800 1+1?", "answer": "2"}\n', "not UTF-8"),
        ('{"prompt": "1+1?", "answer": "2", "answer": "3"}\n', "has the key 'answer' twice"),
        (PLAIN | {"answer": ""}, r"no ground truth \(answer\)"),
        (PLAIN | {"answer": None}, "no ground truth"),
        (DAPO | {"reward_model": {"style": "rule"}}, r"no ground truth \(reward_model.ground_truth\)"),
        (DAPO | {"reward_model": "2"}, "no ground truth"),
        (GSM8K | {"answer": "One and one.\nIt is 2"}, "no ground truth .*####"),
        (GSM8K | {"answer": "One and one is <<1+1=2>>2."}, "no ground truth .*####"),
        (MATH | {"solution": "2"}, "no ground truth .*boxed"),
    ],
)
def test_a_bad_row_is_named_in_one_line(tmp_path, tokenizer, row, complaint):
    path = write(tmp_path / "bad.jsonl", [PLAIN, PLAIN, row])
    with pytest.raises(UserError, match=complaint) as caught:
        load(path, tokenizer)
    assert f"{path}, row 3: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_parquet_row_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "bad.parquet", [PLAIN, PLAIN | {"prompt": ""}])
    with pytest.raises(UserError, match="bad.parquet, row 2: empty prompt"):
        load(path, tokenizer)


def test_bad_files_are_named(tmp_path, tokenizer):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "2"}\n')
    (tmp_path / "wide.jsonl").write_text(json.dumps(PLAIN), "utf-16")
    (tmp_path / "array.jsonl").write_text(json.dumps([PLAIN]))
    texts = [pa.array(["1+1?"]), pa.array(["2"]), pa.array(["3"])]
    pq.write_table(pa.Table.from_arrays(texts, ["prompt", "answer", "answer"]), tmp_path / "twins.parquet")
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"prompt": latin, "answer": ["2"]}), tmp_path / "latin.parquet")
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "long.jsonl", [PLAIN | {"prompt": "x" * 90}])
    for name, complaint in [
        ("none.jsonl", "no such file"),
        ("folder.jsonl", "a directory; give one"),
        ("data.csv", "unknown kind of file '.csv'"),
        ("broken.parquet", "cannot be read as .parquet"),
        ("latin.jsonl", "row 1: not UTF-8"),
        ("wide.jsonl", "row 1: not UTF-8"),
        ("array.jsonl", "row 1: a list, not a JSON object; write one object per line"),
        ("twins.parquet", "two columns have one name"),
        ("latin.parquet", "cannot be read as .parquet: 'utf-8' codec"),
        ("empty.jsonl", "the file has no rows"),
        ("long.jsonl", "all 1 prompts are over 100 tokens"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            load(tmp_path / name, tokenizer, overlong="drop")
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("number", "truth"),
    [
        ("0.00001", "0.00001"),
        ("2.5e-5", "0.000025"),
        ("1E+3", "1000"),
        ("0.10", "0.10"),
        ("27.0", "27"),
        ("-0.0", "0"),
        ("1e20", "100000000000000000000"),
        ("100000000000000000001", "100000000000000000001"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ('["34"]', "34"),
        ("[0.5]", "0.5"),
    ],
)
def test_a_number_of_json_keeps_its_digits(tmp_path, tokenizer, number, truth):
    (prompt,) = load(write(tmp_path / "a.jsonl", [f'{{"prompt":"1+1?","answer":{number}}}']), tokenizer)
    assert prompt.ground_truth == truth


def test_a_small_number_is_met_by_its_value(tmp_path, tokenizer):
    (prompt,) = load(write(tmp_path / "a.jsonl", ['{"prompt":"1/100000?","answer":0.00001}']), tokenizer)
    answers = ["\\boxed{0.00001}", "\\boxed{10^{-5}}", "\\boxed{e-5}"]
    assert math_reward.score(answers, [prompt.ground_truth] * 3).tolist() == [1, 1, 0]


def test_numbers_of_parquet(tmp_path, tokenizer):
    short = pa.struct([("ground_truth", pa.float32())])
    for name, column, truths in [
        ("answer", pa.array([0.1, 1e-5, 27.0], pa.float32()), ["0.1", "0.00001", "27"]),
        ("answer", pa.array([0.1, 1e-5, 27.0]), ["0.1", "0.00001", "27"]),
        ("reward_model", pa.array([{"ground_truth": 0.1}], short), ["0.1"]),
        ("answer", pa.array([[0.1]], pa.list_(pa.float32())), ["0.1"]),
    ]:
        score = pa.array([0.3] * len(truths), pa.float32())
        table = pa.table({"prompt": ["1+1?"] * len(truths), name: column, "score": score})
        pq.write_table(table, tmp_path / "a.parquet")
        prompts = load(tmp_path / "a.parquet", tokenizer)
        assert [p.ground_truth for p in prompts] == truths
        assert prompts[0].extra == {"score": 0.3}


def test_other_numbers_of_a_row_stay_numbers(tmp_path, tokenizer):
    (prompt,) = load(
        write(tmp_path / "a.jsonl", [PLAIN | {"score": 0.25, "more": {"at": [1e-5]}}]), tokenizer
    )
    assert prompt.extra["score"] + 1 == 1.25
    copied = pickle.loads(pickle.dumps(prompt.extra))  # as prompts travel between processes
    assert copied == {"score": 0.25, "more": {"at": [1e-5]}}
    assert json.dumps(copied) == '{"score": 0.25, "more": {"at": [1e-05]}}'


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [
        ('["34", "35"]', "row 1: reward_model.ground_truth is a list; write one text"),
        ('[["34"]]', "reward_model.ground_truth is a list"),
        ("[]", "reward_model.ground_truth is a list"),
        ("[null]", "no ground truth"),
        ('{"value": 34}', "reward_model.ground_truth is a dict; write one text"),
        ("true", "reward_model.ground_truth is a bool; write one text"),
        ("NaN", "reward_model.ground_truth is nan; give a number"),
        ("-Infinity", "reward_model.ground_truth is -inf"),
        ("1e99999999", "reward_model.ground_truth is 1e99999999"),
        ("0e-99999999", "reward_model.ground_truth is 0e-99999999"),
    ],
)
def test_a_truth_that_is_no_text_is_named(tmp_path, tokenizer, truth, complaint):
    row = f'{{"prompt": "17*2=", "reward_model": {{"ground_truth": {truth}}}}}'
    with pytest.raises(UserError) as caught:
        load(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert complaint in str(caught.value)


def test_a_truth_of_another_column_type_is_named(tmp_path, tokenizer):
    for answer in (Decimal("34.0"), b"34", datetime.date(2026, 1, 1)):
        path = write(tmp_path / "a.parquet", [{"question": "1+1?", "answer": answer}])
        with pytest.raises(UserError, match=f"row 1: answer is a {type(answer).__name__}; write one text"):
            load(path, tokenizer)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(PLAIN) + "\r\n", "utf-8-sig")
    assert [p.ground_truth for p in load(tmp_path / "a.jsonl", tokenizer)] == ["2"]


def test_the_instruction_ends_the_last_question(tmp_path, tokenizer):
    messages = [
        SYSTEM,
        *USER,
        {"role": "assistant", "content": "2"},
        *USER,
        {"role": "assistant", "content": "It"},
    ]
    path = write(tmp_path / "a.jsonl", [PLAIN | {"prompt": messages}])
    (prompt,) = load(path, tokenizer, instruction=" Box it.", max_prompt_tokens=65)
    text = "[system]Add.[user]1+1?[assistant]2[user]1+1? Box it.[assistant]It"
    assert tokenizer.decode(prompt.token_ids) == text
    with pytest.raises(UserError, match="the prompt has 65 tokens, over"):
        load(path, tokenizer, instruction=" Box it.", max_prompt_tokens=64)


@pytest.mark.parametrize("rows", [(GSM8K, "bare"), ("bare", GSM8K), (GSM8K, GSM8K, "bare", GSM8K)])
def test_a_solution_of_gsm8k_without_its_end_is_not_taken_as_the_answer(tmp_path, tokenizer, rows):
    """On one line it looks like the bare answer of a benchmark; the rest of the file tells."""
    bare = GSM8K | {"answer": "One and one is 2."}
    path = write(tmp_path / "a.jsonl", [bare if row == "bare" else row for row in rows])
    place, other = rows.index("bare") + 1, rows.index(GSM8K) + 1
    complaint = f'{path}, row {place}: no "####" in answer, but row {other} has one; end it'
    with pytest.raises(UserError, match=complaint):
        load(path, tokenizer)


def test_bare_answers_of_a_benchmark_are_taken(tmp_path, tokenizer):
    rows = [GSM8K | {"answer": answer} for answer in ("2", 2, "x + 1")]
    assert [p.ground_truth for p in load(write(tmp_path / "a.jsonl", rows), tokenizer)] == ["2", "2", "x + 1"]


FILTERS = """
def hard(prompt):
    return prompt.extra["pass_rate"] < 0.5 and prompt.data_source == "sums"
def nothing(prompt):
    return False
def forgets(prompt):
    prompt.ground_truth == "2"
def fails(prompt):
    return prompt.extra["passrate"] < 0.5
"""


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """Prompts with a column pass_rate, and FILTERS beside them."""
    (tmp_path / "filters.py").write_text(FILTERS)
    sums = PLAIN | {"data_source": "sums"}
    rows = [sums | {"pass_rate": 0.9}, sums | {"pass_rate": 0.2}, PLAIN | {"pass_rate": 0.1}]
    return write(tmp_path / "a.jsonl", [*rows, sums | {"pass_rate": 0.4}])


def test_a_filter_sees_the_columns_and_says_what_it_dropped(rated, tokenizer, caplog):
    name = f"{rated.parent}/filters.py:hard"
    kept = load(rated, tokenizer, keep=name)
    assert [p.index for p in kept] == [1, 3]
    assert f"{rated}: data.filter={name} dropped 2 of 4 prompts" in caplog.text
    assert digest(kept) != digest(load(rated, tokenizer))  # so a resume with another filter is refused


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nothing", r"a.jsonl: data.filter=\S+:nothing drops all 4 prompts"),
        ("forgets", r"a.jsonl, row 1: data.filter=\S+ returned 'None'; return True or False"),
        ("fails", r"a.jsonl, row 1: data.filter=\S+ raised KeyError: 'passrate'"),
        ("lacks", r"data.filter is .*has no function or class 'lacks'"),
    ],
)
def test_a_filter_that_cannot_be_used_is_named(rated, tokenizer, name, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        load(rated, tokenizer, keep=f"{rated.parent}/filters.py:{name}")
    assert "\n" not in str(caught.value)
    assert name != "fails" or isinstance(caught.value.__cause__, KeyError)
