"""Tests tools/plan.py: published layouts fit, impossible ones do not, all outputs agree."""

import argparse
import json
from pathlib import Path

import pytest
from support import warm
from support.launch_scripts import command, make_doubles
from transformers import AutoConfig

from megatron_bicc.cli import parse_config
from megatron_bicc.config import ParallelConfig
from megatron_bicc.model.build import transformer_config
from megatron_bicc.sglang.process import _command
from megatron_bicc.startup import validate

REPOSITORY = Path(__file__).parents[2]
# several processes or many shards; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
CONFIGS = "examples/configs"
MEGATRON = [
    "megatron.ddp.overlap_grad_reduce=true",
    "megatron.optimizer.optimizer_cpu_offload=true",
    "megatron.optimizer.optimizer_offload_fraction=0.5",
]
LENGTHS = "train.max_sequence_tokens={0} train.max_tokens_per_microbatch={0} rollout.max_new_tokens={1}"
SHORT, LONG = LENGTHS.format(4096, 3072).split(), LENGTHS.format(16384, 15360).split()


def layout(tensor: int, pipeline: int, recompute: str) -> list[str]:
    """Settings of one."""
    return [
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"model.recompute={recompute}",
    ]


def case(config: str, world_size: int, settings: list[str], *options: str, gpu: str = "H100") -> list[str]:
    """A command line of tools/plan.py."""
    where = ["--config", f"{CONFIGS}/{config}.yaml", "--world-size", str(world_size), "--gpu", gpu]
    return [*where, *options, *settings]


# GRPO on 80 GB H100s as NVIDIA-NeMo/RL publishes it, all with micro-batches of one sequence:
# examples/configs/grpo_math_70B_megatron.yaml: Llama-3.3-70B, 8 hosts, TP 4, PP 4, 4096 tokens;
# examples/configs/recipes/llm/performance/grpo-llama3.3-70b-instruct-4n8g.yaml: 4 hosts, TP 4, PP 8, 4096;
# the same -16k.yaml: 4 hosts, TP 4, PP 8, 16,384 tokens, activation checkpointing.
# The first serves Qwen2.5-72B too. It keeps activations by fused kernels, which the layers here lack: with
# full recompute.
PUBLISHED = {
    "llama 8n8g 4k": case("llama_70b", 64, [*SHORT, *layout(4, 4, "full")]),
    "qwen 8n8g 4k": case("qwen2.5_72b", 64, [*SHORT, *layout(4, 4, "full")]),
    "llama 4n8g 4k": case("llama_70b", 32, [*SHORT, *layout(4, 8, "none")]),
    "llama 4n8g 16k": case("llama_70b", 32, [*LONG, *layout(4, 8, "full")]),
}
IMPOSSIBLE = {
    "one host": case("llama_70b", 8, layout(8, 1, "full")),
    "no recompute": case("llama_70b", 64, layout(8, 4, "none")),
}
OTHERS = {
    "launch script": case("llama_70b", 64, [], "--server-gpus", "8"),
    "llama 32k": case("llama_70b_32k", 64, []),
    "wrong": case("llama_70b", 64, ["parallel.tensor=3"]),
    "proposals": case("tiny", 8, [], "--propose", "3", "--picture", "PICTURE", gpu="H200"),
    "links": case(
        "tiny", 8, MEGATRON, "--network-gbits", "100", "--sync-gbits", "200", "--efficiency", "0.5"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def results(root: Path, model_dirs: dict[str, Path]) -> dict[str, dict]:
    """Every plan, by name."""
    experts = case("tiny", 8, [f"model.path={model_dirs['qwen3_moe']}"], "--propose", "999", gpu="H200")
    cases = {**PUBLISHED, **IMPOSSIBLE, **OTHERS, "experts": [*experts, "parallel.sequence=true"]}
    cases = {n: [str(root / "plan.png") if a == "PICTURE" else a for a in c] for n, c in cases.items()}
    done = warm.run([Path(__file__).with_name("plan_worker.py"), json.dumps(cases), root])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "out.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_fit(results: dict[str, dict], name: str) -> None:
    assert results[name]["status"] == 0, results[name]["out"] + results[name]["err"]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_layouts_do_not(results: dict[str, dict], name: str) -> None:
    assert results[name]["status"] == 1
    assert "DOES NOT FIT in 84.9 GB" in results[name]["out"]


def test_responses_of_32k_fit_on_context_ranks(results: dict[str, dict]) -> None:
    found = results["llama 32k"]
    assert found["status"] == 0, found["out"] + found["err"]
    plan = found["figures"]["plan"]
    assert plan["layout"] == "TP 8 SP, CP 2 of 24,576 rows, PP 4, DP 1, recompute full"
    assert plan["traffic"]["context"] > 0 and plan["seconds"]["context_traffic"] > 0
    assert plan["context_imbalance"] < 1.1
    assert all(rank["shared_keys"] > 0 for rank in plan["memory"])


def test_a_mistake_is_one_line(results: dict[str, dict]) -> None:
    assert results["wrong"]["status"] == 2
    (line,) = results["wrong"]["err"].splitlines()
    assert line.startswith("plan: error: parallel.tensor is 3")


def test_proposals_fit_and_the_shortest_step_is_first(results: dict[str, dict], root: Path) -> None:
    found = results["proposals"]
    others = found["figures"]["proposals"]
    assert found["status"] == 0 and len(others) == 3
    assert all(other["fits"] for other in others)
    times = [other["seconds"]["step"] for other in others]
    assert times == sorted(times) and times[0] <= found["figures"]["plan"]["seconds"]["step"]
    assert all(other["layout"] in found["out"] for other in others)
    assert (root / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_proposals_with_experts_are_what_start_up_accepts(
    results: dict[str, dict], model_dirs: dict[str, Path]
) -> None:
    assert results["experts"]["status"] == 0, results["experts"]["err"]
    proposed = set()
    for other in results["experts"]["figures"]["proposals"]:
        config = parse_config(["--config", f"{CONFIGS}/tiny.yaml", f"model.path={model_dirs['qwen3_moe']}"])
        config.parallel, config.model.recompute = ParallelConfig(**other["parallel"]), other["recompute"]
        config.train.max_tokens_per_microbatch = other["max_tokens_per_microbatch"]
        validate(config, 8)
        transformer_config(AutoConfig.from_pretrained(config.model.path), config)
        proposed.add((config.parallel.tensor, config.parallel.pipeline, config.parallel.expert))
    assert proposed == {(t, p, e) for t in (1, 2) for p in (1, 2) for e in (1, 2, 4)}


def test_links_are_those_of_the_command_line(results: dict[str, dict]) -> None:
    cluster = results["links"]["figures"]["plan"]["cluster"]
    assert (cluster["network"], cluster["sync_link"]) == (12.5e9, 25e9)
    assert cluster["compute_efficiency"] == 0.5


def test_settings_of_megatron_that_are_not_counted_are_named(results: dict[str, dict]) -> None:
    names = ", ".join(setting.partition("=")[0] for setting in MEGATRON)
    line = f"assumed: not counted in the optimizer's size, activations, traffic and times: {names}"
    assert line in results["links"]["out"].splitlines()
    assert "megatron." not in results["proposals"]["out"]


def test_memory_adds_up(results: dict[str, dict]) -> None:
    plan = results["llama 8n8g 4k"]["figures"]["plan"]
    for rank in plan["memory"]:
        state = rank["weights"] + rank["gradients"] + rank["optimizer"] + rank["reserve"]
        assert rank["peak"] == state + max(rank["activations"] + rank["logits"], rank["sync_bucket"])
    assert plan["traffic"]["sync"] == 2 * plan["parameters"]
    links = 3 / 4 / (0.8 * 450e9) + 1 / (0.8 * 50e9)  # 4 tensor ranks; a stage on another host
    assert plan["seconds"]["sync"] == pytest.approx(plan["traffic"]["sync"] * (links + 1 / 5e9))


def test_a_colocated_server_has_the_cache_that_the_plan_says(
    results: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SGLang's rule (its _profile_available_bytes, 0.5.23), applied to the command that a run of
    examples/run_bicc_70b.sh starts a server with: the cache gets what is free after the weights are loaded,
    but for a share of what was free before."""
    monkeypatch.chdir(REPOSITORY)
    run = command(make_doubles(tmp_path), "run_bicc_70b.sh", MASTER_ADDR="host0")
    config = parse_config(run[run.index("megatron_bicc.train") + 1 :])
    assert config.rollout.colocate
    monkeypatch.setattr("megatron_bicc.device.has_cuda", lambda: True)
    server = argparse.ArgumentParser()
    server.add_argument("--mem-fraction-static", type=float)
    server.add_argument("--tp-size", type=int)
    arguments, _ = server.parse_known_args(_command(config, "http://127.0.0.1:1", seed=1))

    plan = results["launch script"]["figures"]["plan"]
    fullest = max(plan["memory"], key=lambda rank: rank["weights"] + rank["gradients"] + rank["optimizer"])
    state = fullest["weights"] + fullest["gradients"] + fullest["optimizer"] + fullest["reserve"]
    before = 79.10 * 2**30 - state - 2e9  # and the server's CUDA context
    after = before - 2 * 70_553_706_496 / arguments.tp_size  # bf16; Llama-3.x-70B without its norms
    cache = after - before * (1 - arguments.mem_fraction_static)
    tokens = cache * arguments.tp_size / (80 * 2 * 8 * 128 * 2)  # layers, keys and values of 8 heads, bf16
    assert plan["kv_space"]["tokens"] == pytest.approx(tokens, rel=0.1)
    # room for the step's rollouts: 32 groups of 8 on 8 servers, at most 1,024 + 8,192 tokens each
    assert tokens > 32 * 9_216
    assert f"{plan['kv_space']['tokens']:,} tokens per server" in results["launch script"]["out"]
