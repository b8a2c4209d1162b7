"""Tests that a chat template which reads the clock sees one date for a whole run, on any day."""

import json
import logging
import shutil
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_bicc import evaluate
from megatron_bicc.cli import parse_config
from megatron_bicc.config import settings as all_settings
from megatron_bicc.data.encoding import PromptEncoder, asks_for_date, fix_date
from megatron_bicc.errors import UserError
from megatron_bicc.startup import Inputs, read_inputs

TINY = Path(__file__).parents[2] / "examples/tiny_policy"
DAY, TODAY = "2026-01-04", date.today
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
)
TEMPLATES = {
    "{%- set d = strftime_now('%d') %}<|user|>{{ d }}.": "<|user|>04.",
    LLAMA + "{{ date_string }}": "04 Jan 2026",
    "{% macro head() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}": "2026-01-04",
    '{% for m in messages %}{{ strftime_now("%A, %-d. %B, 100 percent %H:%M") }}{% endfor %}': (
        "Sunday, 4. January, 100 percent 00:00"
    ),
    # whitespace at its start is the template's own
    "\n {{ strftime_now('%y') }}": "\n 26",
    "  {% if true %}{{ strftime_now('%y') }}{% endif %}": "26",
}
MESSAGES = [{"role": "user", "content": "1+1="}]
QUESTION = "{{ messages[0].content }}"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_sees_the_date(template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template + QUESTION
    assert asks_for_date(tokenizer)
    fix_date(tokenizer, date.fromisoformat(DAY))
    assert tokenizer.decode(PromptEncoder(tokenizer).encode(MESSAGES)) == TEMPLATES[template] + "1+1="


@pytest.mark.parametrize("template", [t for t in TEMPLATES if "%H" not in t])
def test_nothing_else_of_it_changes(template: str) -> None:
    """On the same day the token ids are those that transformers makes with the clock."""
    for _ in range(2):  # the second time if midnight came between
        before, found = TODAY(), []
        for fixed in (False, True):
            tokenizer = AutoTokenizer.from_pretrained(TINY)
            tokenizer.chat_template = template + QUESTION
            if fixed:
                fix_date(tokenizer, before)
            found.append(PromptEncoder(tokenizer).encode(MESSAGES).tolist())
        if TODAY() == before:
            break
    assert found[0] == found[1]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """A run and an evaluation of a policy whose template asks for the date."""
    model = shutil.copytree(TINY, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d.%m.%Y ') }}" + template.read_text())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    names = {"model.path": model, "data.train": tmp_path / "prompts.jsonl", "output_dir": tmp_path / "run"}
    return [
        *(f"{name}={path}" for name, path in names.items()),
        "rollout.prompts_per_step=1",
        "rollout.max_new_tokens=32",
        "data.max_prompt_tokens=64",
    ]


def text(inputs: Inputs) -> str:
    return inputs.tokenizer.decode(inputs.prompts[0].token_ids)


def test_a_run_says_which_date_it_takes(settings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    days = [TODAY()]
    inputs = read_inputs(parse_config(settings))
    days.append(TODAY())
    assert date.fromisoformat(inputs.config.data.date) in days
    assert text(inputs).startswith(date.fromisoformat(inputs.config.data.date).strftime("%d.%m.%Y "))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "its chat template uses today's date" in line
    assert f"data.date={inputs.config.data.date}" in line


def test_a_date_that_is_set_is_the_date(settings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    inputs = read_inputs(parse_config([*settings, f"data.date={DAY}"]))
    assert text(inputs).startswith("04.01.2026 ")
    assert not caplog.records
    other = read_inputs(parse_config([*settings, "data.date=2026-01-05"]))
    assert inputs.contents != other.contents
    with pytest.raises(UserError, match="data.date is '4.1.2026'; it must be a date, YYYY-MM-DD, or empty"):
        all_settings()["data.date"].check("4.1.2026")


def test_without_a_template_that_asks_there_is_no_date(settings: list[str]) -> None:
    assert read_inputs(parse_config([*settings, f"model.path={TINY}"])).config.data.date == ""


def test_an_evaluation_goes_on_with_the_date_of_its_answers(settings: list[str], tmp_path: Path) -> None:
    kept = {"settings": {"data.date": DAY}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/prompts.jsonl").write_text(json.dumps(kept) + "\n")
    inputs = evaluate.read_inputs(parse_config(settings), [str(tmp_path / "prompts.jsonl")])
    assert inputs.config.data.date == DAY
    assert all_settings()["data.date"].rule.decides_score
    (prompt,) = inputs.benchmarks["prompts"].prompts
    assert inputs.tokenizer.decode(prompt.token_ids).startswith("04.01.2026 ")
