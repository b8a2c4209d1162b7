"""Accuracy of a policy on benchmark files.

python -m megatron_bicc.evaluate --model DIR --benchmark FILE [--benchmark FILE ...] --k 32 [name=value ...]
"""

from megatron_bicc import launcher
from megatron_bicc.errors import UserError

if __name__ == "__main__":
    launcher.end_with_launcher()  # before the imports below, which take seconds

import argparse
import logging
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_bicc import device, run_lock
from megatron_bicc.cli import abort, parse_config, settings
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, digest
from megatron_bicc.evaluation.benchmarks import ask, names_of, run_benchmark
from megatron_bicc.evaluation.results import AnswerFile, Answers, Evaluation, summarize, write_results
from megatron_bicc.rewards.registry import Verifier, check_reward, get_verifier
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.types import Engine, RolloutError, Sampling
from megatron_bicc.startup import (
    check_policy,
    engine_positions,
    heldout_prompts,
    hold_output_dir,
    make_engine,
    read_tokenizer,
    with_date,
)
from megatron_bicc.validation import validate_evaluation
from megatron_bicc.weights.hf_files import warn_of_index

PROGRAM = "python -m megatron_bicc.evaluate"
DECISIVE = (
    "model.dtype",
    "data.max_prompt_tokens",
    "data.overlong_prompts",
    "data.date",
    "data.control_tokens",
    "rollout.engine",
    "rollout.max_new_tokens",
    "rollout.batch_size",
    "reward.verifier",
    "reward.answer",
    "reward.threshold",
    "evaluation.instruction",
    "evaluation.prompts",
    "evaluation.samples",
    "evaluation.temperature",
    "seed",
)
"""Settings that decide the figures"""
NO_SETTINGS = {
    "evaluation.samples": "--k",
    "model.path": "--model",
    "output_dir": "--out",
    "dry_run": "nothing",
}
"""Settings of a run that an evaluation takes otherwise, and how"""


@dataclass(frozen=True)
class Inputs:
    """What an evaluation reads from files; by the benchmark's name where there is one a benchmark."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    paths: dict[str, str]
    prompts: dict[str, list[Prompt]]


def main(argv: list[str]) -> None:
    """An evaluation from its command line. A mistake in it is one line on stderr and exit status 2."""
    options, overrides = _arguments(argv)
    if not options.k.isdigit() or int(options.k) < 1:
        abort(f"--k is {options.k}; it must be a whole number from 1", PROGRAM)
    for name, instead in NO_SETTINGS.items():
        if any(word.lstrip("-").replace("-", "_").partition("=")[0] == name for word in overrides):
            abort(f"{name} is no setting of an evaluation; give {instead} instead", PROGRAM)
    out = Path(options.out or f"runs/evaluation/{Path(options.model).resolve().name}")
    given = [f"model.path={options.model}", f"evaluation.samples={options.k}", f"output_dir={out}"]
    config = parse_config([*overrides, *given], PROGRAM)
    try:
        inputs = read_inputs(config, options.benchmark)
        device.start_distributed()
        hold_output_dir(config)
        evaluations = evaluate_benchmarks(inputs)
    except (UserError, RolloutError) as error:
        abort(str(error), PROGRAM)
    except KeyboardInterrupt:
        abort("stopped; the same command goes on", PROGRAM)
    if dist.get_rank() == 0:
        run_lock.check()
        print(write_results(out, decisive(inputs.config), evaluations), end="")
        print(f"\nfigures  {out / 'results.json'}")
        print(f"answers  {', '.join(str(out / f'{name}.jsonl') for name in evaluations)}")
    device.end_distributed()


def read_inputs(config: Config, paths: list[str]) -> Inputs:
    """Reads and checks every setting and file. Raises UserError, one line, for the first mistake."""
    validate_evaluation(config, paths)
    check_reward(config.reward)
    named = names_of(paths)
    tokenizer = read_tokenizer(config.model.path)
    hf_config = check_policy(config)
    config = with_date(config, tokenizer, _kept_date(config, named))
    prompts = {name: heldout_prompts(config, path, tokenizer) for name, path in named.items()}
    _check_lengths(config, hf_config, named, prompts)
    warn_of_index(config.model.path)
    return Inputs(config, tokenizer, get_verifier(config.reward), named, prompts)


def _kept_date(config: Config, named: dict[str, str]) -> str:
    """data.date under which the answers that are already there were asked for; empty if there are none."""
    files = [AnswerFile(Path(config.output_dir) / f"{name}.jsonl", {}) for name in named]
    return next((day for file in files if (day := file.kept_settings().get("data.date"))), "")


def _check_lengths(
    config: Config, hf_config: PretrainedConfig, paths: dict[str, str], prompts: dict[str, list[Prompt]]
) -> None:
    """Raises UserError where an answer can be longer than the model, or its server, has positions for."""
    response, most = config.rollout.max_new_tokens, engine_positions(config, hf_config)
    for name, own in prompts.items():
        longest = max(own, key=lambda prompt: len(prompt.token_ids))
        tokens = len(longest.token_ids)
        if tokens + response > most:
            raise UserError(
                f"{paths[name]}, row {longest.index + 1}: the prompt's {tokens} tokens + "
                f"rollout.max_new_tokens = {response} make {tokens + response}; {config.model.path} has "
                f"{most} positions (max_position_embeddings in config.json, --context-length of a server): "
                "lower rollout.max_new_tokens"
            )


def evaluate_benchmarks(inputs: Inputs) -> dict[str, Evaluation]:
    """The figures of every benchmark by its name; answers are kept in output_dir, NAME.jsonl. Collective.

    Raises UserError, one line, where that holds answers of other settings, before anything is generated,
    RolloutError when no rollout server does its work.
    """
    config = inputs.config
    files = {name: _answer_file(inputs, name) for name in inputs.paths}
    disable_progress_bar()  # the evaluation has one of its own
    with closing(make_engine(config, inputs.tokenizer)) as engine:
        answers = _answers(inputs, files, engine)
    return {name: summarize(own, config.reward.threshold) for name, own in answers.items()}


def _answers(inputs: Inputs, files: dict[str, AnswerFile], engine: Engine) -> dict[str, list[Answers]]:
    config = inputs.config
    sampling = Sampling(config.evaluation.temperature, config.rollout.max_new_tokens)
    sampler = GroupSampler(engine, inputs.verifier, inputs.tokenizer, sampling, config.evaluation.samples)
    question = partial(ask, sampler=sampler, seed=config.seed)
    at_once = max(1, config.rollout.batch_size * dist.get_world_size() // config.evaluation.samples)
    return {n: run_benchmark(n, own, question, files[n], at_once) for n, own in inputs.prompts.items()}


def decisive(config: Config) -> dict[str, Any]:
    """What, beside the files, decides the figures."""
    values = {name: _value(config, name) for name in DECISIVE}
    return values | {"model": _files(config.model.path), "processes": dist.get_world_size()}


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _files(directory: str) -> dict[str, list[int]]:
    """Size and time of every file of a policy: another checkpoint of it has the same names and sizes."""
    paths = sorted(p for p in Path(directory).iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _answer_file(inputs: Inputs, name: str) -> AnswerFile:
    path, out = inputs.paths[name], Path(inputs.config.output_dir)
    stat = Path(path).stat()
    settings = decisive(inputs.config) | {
        "benchmark": [path, stat.st_size, stat.st_mtime_ns],
        "token ids of the prompts": digest(inputs.prompts[name])[:12],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {out}; no such directory can be made: {error.strerror}") from error
    file = AnswerFile(out / f"{name}.jsonl", settings)
    if dist.get_rank() == 0:
        file.load()
    return file


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, and one process to say it."""

    def error(self, message: str) -> NoReturn:
        abort(message, PROGRAM)


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the settings."""
    lines = [
        f"  {name}  {settings()[name].help} [{settings()[name].default!r}]"
        for name in DECISIVE
        if name != "evaluation.samples"
    ]
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s --model DIR --benchmark FILE [--benchmark FILE ...] [--k 32] [name=value ...]",
        description="avg@k with its standard error and the unbiased pass@k of a policy on benchmark files.",
        epilog="settings of megatron_bicc.train that count here:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory of the policy")
    parser.add_argument(
        "--benchmark",
        required=True,
        action="append",
        metavar="FILE",
        help=".jsonl or .parquet: MATH-500, AMC 2023, AIME 2024 and 2025, or what data.train takes",
    )
    parser.add_argument("--k", default="32", help="samples a prompt [32]")
    parser.add_argument("--out", metavar="DIR", help="answers and results [runs/evaluation/NAME OF MODEL]")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(sys.argv[1:])
