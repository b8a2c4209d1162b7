"""Compares a policy with experts to a real SGLang server, with and without replay of the server's routing.

A random Qwen3-MoE in bf16 samples responses on a server that the benchmark starts; the policy then computes
the log-probs of the same tokens. Rounding makes the two choose different experts for some tokens, whose
log-probs differ far more than rounding does: model.routing_replay=engine takes the server's choice.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from benchmarks._measure import machine, one_process
from benchmarks._steps import GROUP_SIZE, TOKENIZER
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.rollout.sglang_engine import SglangEngine, make_sglang_engine
from megatron_bicc.rollout.types import Group, Request, Sampling
from megatron_bicc.training.batch import Packer, StepBatch, collate
from megatron_bicc.training.learner import Learner
from megatron_bicc.training.routing import FREE, TokenRows
from megatron_bicc.weights.hf_weights import load_policy

PROMPT_TOKENS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--prompts", type=int, default=16, help=f"groups of {GROUP_SIZE} (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a response (%(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="layers (%(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer (%(default)s)")
    parser.add_argument("--per-token", type=int, default=4, help="experts per token (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both.

    Returns:
        tokens; rerouted, the share of (token, layer) where the policy's own routers choose another set of
        experts; for none and engine (model.routing_replay): kl, KL(engine || policy) per token by the k3
        estimator; largest_ratio, max of pi/mu and mu/pi over tokens; beyond_2, share of tokens where that is
        over 2.
    """
    with TemporaryDirectory() as directory, one_process():
        config = _config(Path(directory), arguments)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        learner = Learner(config, load_policy(config), tokenizer)
        with closing(make_sglang_engine(config, tokenizer)) as engine:
            batch_groups = _groups(engine, arguments, len(tokenizer))
        batch = collate(batch_groups)
        figures: dict[str, Any] = {"tokens": len(batch.rollout_logp_T)}
        for replay in ("none", "engine"):
            config.model.routing_replay = replay
            figures[replay] = _agreement(learner.log_probs(batch_groups), batch.rollout_logp_T)
        config.model.routing_replay = "none"
        figures["rerouted"] = _rerouted(learner, batch)
    _print(figures)
    return {**figures, "machine": machine()}


def _config(directory: Path, a: argparse.Namespace) -> Config:
    """Returns the configuration of a run with a random policy, whose directory is written."""
    config = Config(output_dir=str(directory / "run"), algorithm="grpo")
    config.model.path, config.model.dtype = str(directory / "model"), "bfloat16"
    config.model.routing_replay, config.rollout.engine = "engine", "sglang"
    config.rollout.sglang.server_args = "--max-total-tokens 65536"
    config.train.max_sequence_tokens = PROMPT_TOKENS + a.tokens
    config.train.max_tokens_per_microbatch = 2048
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(config.model.path)
    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=a.hidden,
        intermediate_size=2 * a.hidden,
        moe_intermediate_size=a.hidden // 2,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=max(1, a.hidden // 128),
        head_dim=64,
        num_experts=a.experts,
        num_experts_per_tok=a.per_token,
        norm_topk_prob=True,
        # routers and logits of some decision: transformers' own range leaves both nearly uniform
        initializer_range=0.06,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(shape).to(torch.bfloat16).save_pretrained(config.model.path)
    return resolve(config)


def _groups(engine: SglangEngine, a: argparse.Namespace, vocab_size: int) -> list[Group]:
    """Returns groups of the server's responses to random prompts, with its routing."""
    random = np.random.default_rng(0)
    prompts = [random.integers(2, vocab_size - 8, PROMPT_TOKENS).astype(np.int32) for _ in range(a.prompts)]
    requests = [Request(p, i) for p in prompts for i in range(GROUP_SIZE)]
    samples = engine.generate(requests, Sampling(1.0, a.tokens, routing=True))
    rewards = (np.arange(GROUP_SIZE) % 2).astype(np.float32)
    return [
        Group(
            Prompt(i, [], p, "", "", {}), samples[GROUP_SIZE * i :][:GROUP_SIZE], [""] * GROUP_SIZE, rewards
        )
        for i, p in enumerate(prompts)
    ]


def _agreement(policy_T: np.ndarray, engine_T: np.ndarray) -> dict[str, float]:
    log_ratio_T = policy_T.astype(np.float64) - engine_T
    return {
        "kl": float(np.mean(np.expm1(log_ratio_T) - log_ratio_T)),
        "largest_ratio": float(np.exp(np.abs(log_ratio_T).max())),
        "beyond_2": float(np.mean(np.abs(log_ratio_T) > np.log(2))),
    }


def _rerouted(learner: Learner, batch: StepBatch) -> float:
    """Returns the share of (token, layer) where the policy's routers choose another set than the server's."""
    plan, batches = Packer(batch.rollouts).pack(learner.plain)
    with learner.policy.recorded_experts() as recorded:
        learner.policy.log_probs(batches)
    return float(np.mean(np.concatenate([*_differences(plan.ranks[0], recorded, batch)])))


def _differences(layouts: list[Any], recorded: list[torch.Tensor], batch: StepBatch) -> Iterator[np.ndarray]:
    for layout, experts in zip(layouts, recorded, strict=True):
        rows = TokenRows(batch.rollouts).of(layout, 0)
        theirs = np.sort(batch.experts[rows[rows != FREE]])
        ours = np.sort(experts.cpu().numpy()[rows != FREE])
        yield (theirs != ours).any(-1)


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['tokens']:,} tokens; experts differ for {figures['rerouted']:.2%} of tokens x layers")
    print(f"{'routing_replay':16}{'KL(engine||policy)':>20}{'largest ratio':>16}{'ratio over 2':>16}")
    for replay in ("none", "engine"):
        f = figures[replay]
        print(f"{replay:16}{f['kl']:>20.2e}{f['largest_ratio']:>16.3f}{f['beyond_2']:>16.2%}")
