"""Samples and scores answers to held-out prompts, during training and in a separate evaluation.

An evaluation keeps finished answers in a file and resumes from it after a kill.
"""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_bicc import run_lock
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.evaluation.results import AnswerFile, Answers, Evaluation, answers_of, summarize
from megatron_bicc.rollout.collect import GroupSampler


def run_benchmark(
    name: str,
    prompts: list[Prompt],
    ask: Callable[[list[Prompt]], list[Answers]],
    file: AnswerFile,
    prompts_at_once: int,
) -> list[Answers]:
    """Returns the answers to all prompts, in order; those in `file` are not sampled again. Collective.

    Prompts are sampled in fixed batches, and an unfinished batch is sampled again as a whole: the composition
    of a batch can change the last bits of an engine's log-probs. So a resumed evaluation ends with the same
    figures to the bit.
    """
    first_process = dist.get_rank() == 0
    done = _from_first(file.load() if first_process else {})
    batches = [prompts[i : i + prompts_at_once] for i in range(0, len(prompts), prompts_at_once)]
    waiting = [batch for batch in batches if any(prompt.index not in done for prompt in batch)]
    unfinished = {prompt.index for batch in waiting for prompt in batch}
    done = {index: answers for index, answers in done.items() if index not in unfinished}
    if first_process:
        file.keep(set(done))
    bar = tqdm(total=len(prompts), initial=len(done), desc=name, unit="prompt", disable=not first_process)
    with bar:
        for batch in waiting:
            answers = ask(batch)
            if first_process:
                run_lock.check()
                file.append(answers)
            done |= {one.index: one for one in answers}
            bar.update(len(batch))
    return [done[prompt.index] for prompt in prompts]


def _from_first(value: dict[int, Answers]) -> dict[int, Answers]:
    """Returns the first process's value on every process. Collective."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def names_of(paths: list[str]) -> dict[str, str]:
    """Returns paths by benchmark name: the file's stem, prefixed by its directory if stems collide.

    Raises UserError for two files that would still have the same name.
    """
    stems = [Path(path).stem for path in paths]
    named: dict[str, str] = {}
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 else f"{Path(path).resolve().parent.name}_{stem}"
        if name in named:
            raise UserError(
                f"--benchmark {path}: {named[name]} would be named {name} too; rename one of them"
            )
        named[name] = path
    return named


def ask(prompts: list[Prompt], sampler: GroupSampler, seed: int) -> list[Answers]:
    """Samples and scores answers to every prompt, with the same seeds at every call. Collective."""
    return [answers_of(group) for group in sampler.collect(prompts, (seed, "evaluation"))]


def evaluate(prompts: list[Prompt], sampler: GroupSampler, seed: int, threshold: float) -> Evaluation:
    """Returns avg@k and pass@k from k = sampler.group_size answers to every prompt. Collective."""
    return summarize(ask(prompts, sampler, seed), threshold)
