"""Measures the accuracy of a policy on benchmark files.

python -m megatron_bicc.evaluate --model DIR --benchmark FILE [--benchmark FILE ...] --k 32 [name=value ...]
"""

from megatron_bicc import launcher
from megatron_bicc.errors import UserError, abort

if __name__ == "__main__":
    launcher.end_with_launcher()  # before the imports below, which take seconds

import argparse
import logging
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_bicc import device, run_lock
from megatron_bicc.cli import parse_config
from megatron_bicc.config import Config, flatten, setting_of, settings
from megatron_bicc.data.prompts import Prompt, digest
from megatron_bicc.evaluation.benchmarks import (
    AnswerFile,
    Evaluation,
    ask,
    names_of,
    run_benchmark,
    summarize,
    write_results,
)
from megatron_bicc.metrics import phase, waiting_for
from megatron_bicc.rewards.registry import Verifier, check_reward, get_verifier
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.engines import make_engine
from megatron_bicc.rollout.types import RolloutError, Sampling
from megatron_bicc.startup import (
    check_policy,
    engine_positions,
    heldout_prompts,
    hold_output_dir,
    read_tokenizer,
    validate_evaluation,
    with_date,
)
from megatron_bicc.weights.hf_files import fingerprint, warn_of_index

PROGRAM = "python -m megatron_bicc.evaluate"
NO_SETTINGS = {
    "evaluation.samples": "--k",
    "model.path": "--model",
    "output_dir": "--out",
    "dry_run": "nothing",
}
"""Settings of a run that an evaluation does not accept, and what to give instead"""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark file and its prompts."""

    path: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class EvaluationInputs:
    """Checked inputs of an evaluation."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier
    benchmarks: dict[str, Benchmark]
    """By name (evaluation.benchmarks.names_of)"""


def main(argv: list[str]) -> None:
    """Runs the command line. errors.py lists what each kind of exception prints."""
    try:
        run(*_parse(argv))
    except UserError as error:
        abort(str(error), PROGRAM)
    except KeyboardInterrupt:
        abort("interrupted; rerun the command to resume from the saved answers", PROGRAM)
    except RolloutError as error:
        logger.error("%s: error: %s; rerun the command to resume from the saved answers", PROGRAM, error)
        raise
    except RuntimeError as error:
        if device.is_connection_loss(error):
            logger.error("%s: error: %s", PROGRAM, device.lost_connection(error))
        raise


def run(config: Config, paths: list[str]) -> None:
    """Evaluates model.path on benchmark files; rank 0 writes the results to output_dir and prints a table."""
    device.choose_device()
    inputs = read_inputs(config, paths)
    with phase("process group") as sizes:
        device.start_distributed()
        if device.is_first():
            sizes.append(device.description())
        hold_output_dir(config)
    evaluations = evaluate_benchmarks(inputs)
    if dist.get_rank() == 0:
        run_lock.check()
        out = Path(config.output_dir)
        print(write_results(out, decisive(inputs.config), evaluations), end="")
        print(f"\nfigures  {out / 'results.json'}")
        print(f"answers  {', '.join(str(out / f'{name}.jsonl') for name in evaluations)}")
    with waiting_for("the other processes at the end of the evaluation"):
        device.end_distributed()


def read_inputs(config: Config, paths: list[str]) -> EvaluationInputs:
    """Reads and checks every setting and file. Raises UserError, one line, for the first mistake."""
    validate_evaluation(config, paths)
    check_reward(config.reward)
    named = names_of(paths)
    tokenizer = read_tokenizer(config.model.path)
    hf_config, _ = check_policy(config)
    config = with_date(config, tokenizer, _kept_date(config, named))
    benchmarks = {}
    for name, path in named.items():
        with phase(f"benchmark {name}") as sizes:
            benchmarks[name] = Benchmark(path, heldout_prompts(config, path, tokenizer))
            sizes.append(f"{len(benchmarks[name].prompts)} prompts")
    _check_lengths(config, hf_config, benchmarks)
    warn_of_index(config.model.path)
    return EvaluationInputs(config, tokenizer, get_verifier(config.reward), benchmarks)


def _kept_date(config: Config, named: dict[str, str]) -> str:
    """Returns data.date of the answers that are kept in output_dir; empty if there are none."""
    files = [AnswerFile(Path(config.output_dir) / f"{name}.jsonl", {}) for name in named]
    return next((day for file in files if (day := file.kept_settings().get("data.date"))), "")


def _check_lengths(config: Config, hf_config: PretrainedConfig, benchmarks: dict[str, Benchmark]) -> None:
    """Raises UserError if an answer can be longer than the positions of the model or of its server."""
    response, most = config.rollout.max_new_tokens, engine_positions(config, hf_config)
    for benchmark in benchmarks.values():
        longest = max(benchmark.prompts, key=lambda prompt: len(prompt.token_ids))
        tokens = len(longest.token_ids)
        if tokens + response > most:
            raise UserError(
                f"{benchmark.path}, row {longest.index + 1}: the prompt's {tokens} tokens + "
                f"rollout.max_new_tokens = {response} make {tokens + response}; {config.model.path} has "
                f"{most} positions (max_position_embeddings in config.json, --context-length of a server): "
                "lower rollout.max_new_tokens"
            )


def evaluate_benchmarks(inputs: EvaluationInputs) -> dict[str, Evaluation]:
    """Returns the figures of every benchmark by name; keeps the answers in output_dir/NAME.jsonl. Collective.

    Raises UserError, one line and before anything is generated, if a file there holds answers of other
    settings; RolloutError if no rollout server answers.
    """
    config = inputs.config
    files = {name: _answer_file(inputs, name) for name in inputs.benchmarks}
    disable_progress_bar()  # the evaluation has its own
    with phase(f"rollout engine {config.rollout.engine}"):
        engine = make_engine(config, inputs.tokenizer)
    with closing(engine):
        sampling = Sampling(config.evaluation.temperature, config.rollout.max_new_tokens)
        sampler = GroupSampler(engine, inputs.verifier, inputs.tokenizer, sampling, config.evaluation.samples)
        question = partial(ask, sampler=sampler, seed=config.seed)
        at_once = max(1, config.rollout.batch_size * dist.get_world_size() // config.evaluation.samples)
        answers = {
            name: run_benchmark(name, benchmark.prompts, question, files[name], at_once)
            for name, benchmark in inputs.benchmarks.items()
        }
    return {name: summarize(own, config.reward.threshold) for name, own in answers.items()}


def decisive(config: Config) -> dict[str, Any]:
    """Returns everything that the scores depend on: settings, the policy's files, number of processes."""
    values = {
        name: value for name, value in flatten(asdict(config)).items() if setting_of(name).rule.decides_score
    }
    return values | {"model": list(fingerprint(config.model.path)), "processes": dist.get_world_size()}


def _answer_file(inputs: EvaluationInputs, name: str) -> AnswerFile:
    benchmark, out = inputs.benchmarks[name], Path(inputs.config.output_dir)
    stat = Path(benchmark.path).stat()
    settings = decisive(inputs.config) | {
        "benchmark": [benchmark.path, stat.st_size, stat.st_mtime_ns],
        "token ids of the prompts": digest(benchmark.prompts)[:12],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {out}; the directory cannot be made: {error.strerror}") from error
    file = AnswerFile(out / f"{name}.jsonl", settings)
    if dist.get_rank() == 0:
        file.load()
    return file


class _Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake: argparse would print two lines on every rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Returns (settings, benchmark files) of a command line."""
    options, overrides = _arguments(argv)
    if not options.k.isdigit() or int(options.k) < 1:
        raise UserError(f"--k is {options.k}; it must be a whole number from 1")
    for name, instead in NO_SETTINGS.items():
        if any(word.lstrip("-").replace("-", "_").partition("=")[0] == name for word in overrides):
            raise UserError(f"{name} is not a setting of an evaluation; give {instead} instead")
    out = options.out or f"runs/evaluation/{Path(options.model).resolve().name}"
    given = [f"model.path={options.model}", f"evaluation.samples={options.k}", f"output_dir={out}"]
    return parse_config([*overrides, *given], PROGRAM), options.benchmark


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (this command's own options, the settings)."""
    lines = [
        f"  {name}  {setting.usage}"
        for name, setting in settings().items()
        if setting.rule.decides_score and name not in NO_SETTINGS
    ]
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s --model DIR --benchmark FILE [--benchmark FILE ...] [--k 32] [name=value ...]",
        description="avg@k with its standard error and the unbiased pass@k of a policy on benchmark files.",
        epilog="settings of megatron_bicc.train that apply here:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory of the policy")
    parser.add_argument(
        "--benchmark",
        required=True,
        action="append",
        metavar="FILE",
        help=".jsonl or .parquet: MATH-500, AMC 2023, AIME 2024 and 2025, or any schema of data.train",
    )
    parser.add_argument("--k", default="32", help="samples per prompt [32]")
    parser.add_argument("--out", metavar="DIR", help="answers and results [runs/evaluation/NAME OF MODEL]")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron_bicc").setLevel(logging.INFO)
    record(main)(sys.argv[1:])  # torchrun's error file gets the exception of the first rank that fails
