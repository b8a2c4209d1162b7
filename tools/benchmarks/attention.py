"""Compares a stack of layers over shared prefixes with one row per response and with padded pairs.

Every layout runs the same rollouts through the same kernels: megatron-core's layers with this package's
attention, forward and backward, in one sequence. Groups have n right and n wrong rollouts. shared: one prefix
per side. rows: one prefix per response. pairs: every response once for each opposite rollout in its context,
the layout of the paper's authors. pairs_padded: the same, padded to the longest.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from benchmarks._measure import machine, median_ms, one_process, peak_mb
from transformers import Qwen3Config

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.build import PolicyModel, transformer_config
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.packing.types import Chunks, MicroBatch

PROMPT, CONTEXT = 50, 1600
LOG_STD = 0.8
"""Standard deviation of the logarithm of response lengths"""


@dataclass(frozen=True)
class Segment:
    """A prefix and the responses that share it, in tokens."""

    prefix: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One side of a group: n responses of S tokens after a prefix of P."""

    name: str
    prefix: int
    responses: tuple[int, ...]

    def shared(self) -> list[Segment]:
        """Returns one segment: one prefix for all responses."""
        return [Segment(self.prefix, self.responses)]

    def rows(self) -> list[Segment]:
        """Returns one segment per response, each with its own prefix."""
        return [Segment(self.prefix, (length,)) for length in self.responses]

    def pairs(self) -> list[Segment]:
        """Returns one segment per (response, opposite rollout); each has 1/n of the context's tokens."""
        n = len(self.responses)
        prompt = round(self.prefix * PROMPT / (PROMPT + CONTEXT))
        shown = prompt + (self.prefix - prompt) // n
        return [Segment(shown, (length,)) for length in self.responses for _ in range(n)]

    def pairs_padded(self) -> list[Segment]:
        """Returns the pairs, padded to the longest."""
        longest = max(s.prefix + s.responses[0] for s in self.pairs())
        return [Segment(s.prefix, (longest - s.prefix,)) for s in self.pairs()]


LAYOUTS = ("shared", "rows", "pairs", "pairs_padded")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--layers", type=int, default=1, help="layers (%(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (%(default)s)")
    parser.add_argument("--scale", type=float, default=0.25, help="factor on all lengths (%(default)s)")
    parser.add_argument("--responses", type=int, default=4, help="n, responses per side (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; takes the median (%(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device in this type: adds mfu_*")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every case in every layout.

    Returns:
        cases: a list, each with name, P, n, S (mean), ms_* and tokens_* of each layout, peak_mb_shared,
        peak_mb_rows, speedup (ms_rows / ms_shared), token_ratio (tokens_rows / tokens_shared),
        speedup_pairs_padded and flop_ratio_pairs_padded likewise, and mfu_* of each layout, the share of
        --peak-tflops that the layers' FLOPs took (backward counts twice; no output layer).
        kernels_time_ratio: ms_shared / ms_shared_in_torch, the latter with model.kernels=torch (on a GPU).
    """
    a = arguments
    with one_process():
        cases = [measure(case, a) for case in make_cases(a.responses, a.scale)]
    for name in cases[0]:
        print(f"{name:22}" + "".join(f"{_readable(case[name]):>16}" for case in cases))
    return {"cases": cases, "layers": a.layers, "hidden": a.hidden, "machine": machine()}


def make_cases(n: int, scale: float) -> list[Case]:
    """Returns sides with a prompt of 50 tokens and a context of 1,600, by the lengths of their responses."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(math.log(800) - LOG_STD**2 / 2, LOG_STD, n)
    lengths = {f"fixed_{length}": [length] * n for length in (200, 800, 1600, 4000)} | {
        "lognormal_800": drawn
    }
    prefix = round((PROMPT + CONTEXT) * scale)
    return [
        Case(name, prefix, tuple(max(1, round(x * scale)) for x in values))
        for name, values in lengths.items()
    ]


def measure(case: Case, a: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one case."""
    segments = {name: getattr(case, name)() for name in LAYOUTS}
    layers = make_layers(a.layers, a.hidden)
    calls = {name: run_layers(layers, s) for name, s in segments.items()}
    calls["shared_in_torch"] = run_layers(layers, segments["shared"], kernels="torch")
    ms = median_ms(a.repeats, calls)
    peak = {name: peak_mb(make_and_run, a.layers, a.hidden, segments[name]) for name in ("shared", "rows")}
    tokens = {name: sum(s.prefix + sum(s.responses) for s in found) for name, found in segments.items()}
    flops = {name: 3 * sum(flops_of(s, layers) for s in found) for name, found in segments.items()}
    return {
        "name": case.name,
        "P": case.prefix,
        "n": len(case.responses),
        "S": float(np.mean(case.responses)),
        **{f"ms_{name}": value for name, value in ms.items()},
        **{f"tokens_{name}": tokens[name] for name in LAYOUTS},
        **{f"peak_mb_{name}": value for name, value in peak.items()},
        "speedup": ms["rows"] / ms["shared"],
        "kernels_time_ratio": ms["shared"] / ms["shared_in_torch"],
        "token_ratio": tokens["rows"] / tokens["shared"],
        "speedup_pairs_padded": ms["pairs_padded"] / ms["shared"],
        "flop_ratio_pairs_padded": flops["pairs_padded"] / flops["shared"],
        **({f"mfu_{n}": flops[n] / ms[n] / a.peak_tflops / 1e9 for n in LAYOUTS} if a.peak_tflops else {}),
    }


def flops_of(segment: Segment, model: PolicyModel) -> float:
    """Returns forward FLOPs of the layers: 2 per token and weight, 4 per query-key pair and channel."""
    own = [segment.prefix, *segment.responses]
    pairs = sum(x * (x + 1) / 2 for x in own) + segment.prefix * sum(segment.responses)
    weights = sum(p.numel() for p in model.decoder.layers.parameters() if p.dim() == 2)
    width = model.config.num_attention_heads * model.config.kv_channels * model.config.num_layers
    return 2 * weights * sum(own) + 4 * width * pairs


def make_layers(layers: int, hidden: int) -> PolicyModel:
    """Returns a policy of the Qwen3 architecture, random weights, a vocabulary of 64; bf16 on a GPU."""
    hf_config = Qwen3Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        architectures=["Qwen3ForCausalLM"],
    )
    config = Config()
    config.model.dtype = "bfloat16" if device.has_cuda() else "float32"
    with device.megatron():
        model = PolicyModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
    return model.to(device.device(), model.config.params_dtype)


def run_layers(
    model: PolicyModel, segments: list[Segment], kernels: Literal["auto", "torch"] = "auto"
) -> Callable[[], None]:
    """Returns a function: forward and backward over the segments, packed prefix-major in one micro-batch.

    kernels: model.kernels.
    """
    packed = PackedBatch.make(lay_out(segments), device.device())

    def call() -> None:
        device.choose_kernels(kernels)
        with device.megatron():
            model.run(packed)[0].sum().backward()
        model.zero_grad(set_to_none=True)

    return call


def make_and_run(layers: int, hidden: int, segments: list[Segment]) -> Callable[[], None]:
    """Returns `run_layers` of a new model."""
    return run_layers(make_layers(layers, hidden), segments)


def lay_out(segments: list[Segment]) -> MicroBatch:
    """Returns the packed rows. A prefix's last token is not one of its rows: it starts each response."""
    prefixes = [s.prefix - 1 for s in segments]
    responses = [length for s in segments for length in s.responses]
    starts = [s.prefix - 1 for s in segments for _ in s.responses]
    positions = [np.arange(p) for p in prefixes]
    positions += [start + np.arange(length) for start, length in zip(starts, responses, strict=True)]
    positions_N = np.concatenate(positions).astype(np.int32)
    rows = sum(responses)
    return MicroBatch(
        num_rows=len(positions_N),
        tokens_N=(np.arange(len(positions_N)) % 64).astype(np.int32),
        positions_N=positions_N,
        labels_N=np.zeros(len(positions_N), np.int32),
        num_prefix_rows=sum(prefixes),
        num_response_rows=rows,
        cu_seqlens=_cumulative(prefixes + responses),
        cu_prefix=_cumulative(prefixes),
        cu_response_side=_cumulative([sum(s.responses) for s in segments]),
        cu_response=_cumulative(responses),
        rollout_S=np.arange(len(responses), dtype=np.int32),
        group_S=np.zeros(len(responses), np.int32),
        scale_S=np.ones(len(responses), np.float32),
        gather_A=np.arange(rows),
        chunks=(Chunks.of_whole(prefixes + responses, len(positions_N)),),
        context_rank=0,
    )


def _cumulative(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _readable(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}"
