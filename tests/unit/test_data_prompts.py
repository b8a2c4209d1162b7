"""Prompt files: every schema read, every fault named with file and row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_bicc.data import Prompt, load_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = [{"role": "user", "content": "1+1?"}]
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
    with pytest.raises(ValueError, match="21 tokens, over data.max_prompt_tokens=20"):
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
        (PLAIN | {"prompt": None}, "list of messages"),
        (PLAIN | {"prompt": [{"role": "user"}]}, "list of messages"),
        (PLAIN | {"prompt": "x" * 90}, "over data.max_prompt_tokens=100"),
        (PLAIN | {"prompt": [{"role": "tool", "content": "x"}]}, "refuses the messages: no tools here"),
        (PLAIN | {"answer": ""}, r"no ground truth \(answer\)"),
        (PLAIN | {"answer": None}, "no ground truth"),
        (DAPO | {"reward_model": {"style": "rule"}}, r"no ground truth \(reward_model.ground_truth\)"),
        (DAPO | {"reward_model": "2"}, "no ground truth"),
        (GSM8K | {"answer": "One and one.\nIt is 2"}, "no ground truth .*####"),
        (MATH | {"solution": "2"}, "no ground truth .*boxed"),
    ],
)
def test_a_bad_row_is_named_in_one_line(tmp_path, tokenizer, row, complaint):
    path = write(tmp_path / "bad.jsonl", [PLAIN, PLAIN, row])
    with pytest.raises(ValueError, match=complaint) as caught:
        load(path, tokenizer)
    assert f"{path}, row 3: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_parquet_row_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "bad.parquet", [PLAIN, PLAIN | {"prompt": ""}])
    with pytest.raises(ValueError, match="bad.parquet, row 2: empty prompt"):
        load(path, tokenizer)


def test_bad_files_are_named(tmp_path, tokenizer):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "2"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "long.jsonl", [PLAIN | {"prompt": "x" * 90}])
    for name, complaint in [
        ("none.jsonl", "no such file"),
        ("folder.jsonl", "no such file"),
        ("data.csv", "unknown kind of file '.csv'"),
        ("broken.parquet", "cannot be read as .parquet"),
        ("latin.jsonl", "row 1: not valid JSON"),
        ("empty.jsonl", "the file has no rows"),
        ("long.jsonl", "all 1 prompts are over 100 tokens"),
    ]:
        with pytest.raises(ValueError, match=complaint) as caught:
            load(tmp_path / name, tokenizer, overlong="drop")
        assert name in str(caught.value)
