"""Tests memory, traffic and seconds of a plan against arithmetic written out here, on small sizes.

The policy: 8 layers, hidden 64, 8 heads and 4 groups of 8, MLP 96, vocabulary 1000, bf16; on 32 ranks: tensor
2 with sequence parallel, pipeline 4 of 2 chunks, data 4.
"""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.planning import layouts as planning
from megatron_bicc.planning.cost import (
    Cluster,
    Gpu,
    Load,
    Memory,
    Sizes,
    Work,
    checkpoint_memory,
    forward_flops,
    kv_space,
    memory_of,
    saved_bytes,
    step_flops,
    sync_seconds,
    traffic_of,
)
from megatron_bicc.planning.layouts import Plan, make_plan
from megatron_bicc.planning.shards import Shard
from megatron_bicc.planning.synthetic import SyntheticStep, UnknownTokenizer, synthetic_step

HF_CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)
SIZES = Sizes.of(HF_CONFIG)
MATRICES_A_LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
PARAMETERS = 8 * MATRICES_A_LAYER + 2 * 1000 * 64
CLUSTER = Cluster(
    Gpu("toy", memory_bytes=10e6, bf16_flops=1e9, memory_bandwidth=1e6, nvlink=1e6),
    gpus_per_host=8,
    network=1e5,
    sync_link=2e5,
    reserve_bytes=1e6,
    server_reserve_bytes=5e5,
    files=3e5,
    shared_memory=4e5,
)
WORK = Work(forward=Load(4, 1000, 600, 5000), train=Load(6, 3000, 2000, 9000))
WORLD_SIZE = 32


@pytest.fixture
def config() -> Config:
    config = Config(algorithm="grpo")
    p = config.parallel
    p.tensor, p.sequence, p.pipeline, p.virtual_pipeline = 2, True, 4, 2
    config.model.recompute, config.weight_sync.bucket_mb = "full", 1
    config.rollout.prompts_per_step, config.rollout.max_new_tokens = 64, 60
    config.data.max_prompt_tokens = 20
    config.train.max_sequence_tokens = config.train.max_tokens_per_microbatch = 128
    return resolve(config)


def shard(pipeline_rank: int) -> Shard:
    return Shard(8 * pipeline_rank, pipeline_rank, (1, 5), 30_000, 60_000, 120_000, 0, 0, 50_000)


@pytest.fixture
def step(config: Config) -> SyntheticStep:
    return synthetic_step(config, HF_CONFIG, UnknownTokenizer(), data_parallel=4)


@pytest.fixture
def plan(config: Config, step: SyntheticStep) -> Plan:
    shards = [shard(0), shard(3)]
    return make_plan(config, HF_CONFIG, WORLD_SIZE, step, CLUSTER, server_gpus=4, shards=shards)


def test_saved_bytes_term_by_term(config: Config) -> None:
    """The loss keeps an int64 and three fp32 numbers of a response's row, and selective recompute all but
    the log-sum-exp of 4 heads: too little for the comparison with a forward pass to see."""
    many, few = (saved_bytes(SIZES, config, 128, n) for n in (100, 40))
    assert many.last_stage - few.last_stage == 60 * (8 + 3 * 4)
    config.model.recompute = "selective"
    selective = saved_bytes(SIZES, config, 128, 100)
    assert selective.layer_whole - selective.layer == 128 * 4 * 4


def test_experts_keep_what_is_routed_to_them(config: Config) -> None:
    """Three experts a token of width 16: of 64 rows on this rank, gate and up, silu's result, up's copy, the
    product, and the expert's input and output."""
    dense = replace(SIZES, ffn=0)
    routed = replace(SIZES, ffn=16, experts=8, experts_a_token=3)
    found = [saved_bytes(sizes, config, 128, 128).layer_whole for sizes in (dense, routed)]
    assert found[1] - found[0] == 64 * 3 * 2 * (5 * 16 + 2 * 64)


def test_memory_of_the_first_and_the_last_stage(config: Config) -> None:
    saved = saved_bytes(SIZES, config, 128, 128)
    assert saved.layer == 64 * 2 * 64  # under full recompute a layer keeps its input
    first, last = (memory_of(shard(stage), SIZES, config, 64, CLUSTER) for stage in (0, 3))
    # 11 and 5 of a stage's two chunks are in flight; one layer is being computed again
    assert first.activations == int(5.5 * (2 * saved.layer + saved.first_stage)) + saved.layer_whole
    assert last.activations == int(2.5 * (2 * saved.layer + saved.last_stage)) + saved.layer_whole
    assert first.logits == 0
    assert last.logits == 3 * 4 * 128 * 500 + 500 * 64 * (4 + 2)
    assert first.sync_bucket == 2 * 2**20 + 2 * 64 * 1000
    assert (first.weights, first.gradients, first.optimizer) == (60_000, 120_000, 50_000)
    assert first.state == 60_000 + 120_000 + 50_000 + 1_000_000
    assert first.peak == first.state + first.sync_bucket


def test_peak_is_training_or_sending(config: Config) -> None:
    memory = Memory(0, 1, 2, 3, activations=50, logits=7, shared_keys=5, sync_bucket=40, reserve=10)
    assert memory.peak == 16 + 57
    assert replace(memory, shared_keys=9).peak == 16 + 59  # attention is not computed along with logits
    assert replace(memory, sync_bucket=60).peak == 16 + 60


def test_context_ranks_hold_gathered_keys_of_one_layer(config: Config) -> None:
    """Two key-value heads of 8 channels on a tensor rank, 2 x 16 numbers a row, of 4 x 128 rows: keys and
    values, their gradients, and those as sent and as received, in bf16, and once in fp32."""
    alone = memory_of(shard(0), SIZES, config, 64, CLUSTER)
    config.parallel.context = 4
    found = memory_of(shard(0), SIZES, config, 64, CLUSTER)
    assert alone.shared_keys == 0
    assert found.shared_keys == 4 * 128 * 32 * (4 * 2 + 4)
    # max_tokens_per_microbatch is of one context rank
    assert found.activations == alone.activations


def test_room_for_keys_and_values() -> None:
    fullest = Memory(0, 60_000, 120_000, 50_000, 0, 0, 0, 0, 1_000_000)
    kv = kv_space(fullest, SIZES, CLUSTER, server_gpus=4)
    assert kv.server_weights == 2 * PARAMETERS // 4
    assert kv.free == 10_000_000 - 1_230_000 - 500_000
    assert kv.bytes == int(0.8 * kv.free) - kv.server_weights
    assert kv.tokens == 4 * kv.bytes // (2 * 2 * 8 * 4 * 8)
    assert kv_space(replace(fullest, weights=10**8), SIZES, CLUSTER, server_gpus=4).tokens == 0


@pytest.mark.parametrize(
    ("tensor", "pipeline", "first_ranks"),
    [(2, 4, 2), (8, 1, 8), (1, 1, 1), (1, 32, 8)],  # of 32 ranks, 8 a host
)
def test_host_memory_of_a_checkpoint(config: Config, tensor: int, pipeline: int, first_ranks: int) -> None:
    """Main weights and two moments of the whole group, 12 bytes a parameter, and its weights, 2, by the first
    rank of each data-parallel group; 8 more for parts and concatenation of one of the three."""
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    data = 32 // (tensor * pipeline)
    found = checkpoint_memory(shard(0), config, WORLD_SIZE, CLUSTER)
    assert found.kept == first_ranks * 30_000 * (12 + 2)
    assert found.peak == first_ranks * 30_000 * (12 + 8) + 8 * 30_000 * 12 // data


def test_host_memory_of_a_checkpoint_with_experts(config: Config) -> None:
    """Of 32 ranks in 4 stages, 8 a host: the first 2 of a stage keep dense weights, the first 4 the experts',
    here two thirds; all 8 copy their part of a group's state first: of 4 ranks, and of 2."""
    config.parallel.expert = 4
    of_experts = replace(shard(0), expert_weight_bytes=40_000, expert_gradient_bytes=80_000)
    found = checkpoint_memory(of_experts, config, WORLD_SIZE, CLUSTER)
    assert found.kept == (2 * 10_000 + 4 * 20_000) * (12 + 2)
    assert found.peak == (2 * 10_000 + 4 * 20_000) * (12 + 8) + 8 * 12 * (10_000 // 4 + 20_000 // 2)


def test_seconds_of_a_sync(config: Config, plan: Plan) -> None:
    """Half of each tensor comes from the other tensor rank, all of it from another stage."""
    gathered = PARAMETERS / 8e5 + 2 * PARAMETERS / 8e4  # 80 % of a host's link, and of the network
    rates = {"tensor": 4e5, "distributed": 2e5, "disk": 3e5}
    sent = {method: 2 * PARAMETERS / rate for method, rate in rates.items()}
    for config.weight_sync.method, seconds in sent.items():
        found = sync_seconds(plan.traffic, SIZES, config, CLUSTER, WORLD_SIZE)
        assert found == pytest.approx(gathered + seconds)
    config.weight_sync.method = "auto"
    for config.rollout.launch, method in {"spawn": "tensor", "attach": "distributed"}.items():
        found = sync_seconds(plan.traffic, SIZES, config, CLUSTER, WORLD_SIZE)
        assert found == pytest.approx(gathered + sent[method])
    config.parallel.tensor = config.parallel.pipeline = 1
    found = sync_seconds(plan.traffic, SIZES, config, CLUSTER, WORLD_SIZE)
    assert found == pytest.approx(sent["distributed"])


def test_seconds_of_a_sync_of_experts(config: Config) -> None:
    """16 expert-parallel ranks, on two hosts, have 15/16 of the experts that a rank has not."""
    p = config.parallel
    p.tensor, p.pipeline, p.virtual_pipeline, p.expert = 1, 1, 1, 16
    sizes = replace(SIZES, experts=16, experts_a_token=3)
    assert sizes.expert_parameters == 8 * 16 * 3 * 64 * 96
    traffic = traffic_of(sizes, config, WORK, shard(0), WORLD_SIZE, updates=1)
    seconds = 2 * sizes.expert_parameters * 15 / 16 / 8e4 + 2 * sizes.parameters / 4e5
    assert sync_seconds(traffic, sizes, config, CLUSTER, WORLD_SIZE) == pytest.approx(seconds)


def test_flops_of_a_step(config: Config) -> None:
    forward, train = (forward_flops(SIZES, rows) for rows in (WORK.forward, WORK.train))
    assert step_flops(SIZES, config, WORK) == forward + 4 * train
    config.model.recompute = "none"
    assert step_flops(SIZES, config, WORK) == forward + 3 * train


def test_traffic(config: Config) -> None:
    """A stage has two layers; a row of the residual stream has 128 bytes."""
    found = traffic_of(SIZES, config, WORK, shard(0), WORLD_SIZE, updates=2)
    # four collectives a layer forward; six backward, and forward again; a rank sends half of each
    assert found.tensor == 2 * 128 * (4 * 1000 + (4 + 6 + 4) * 3000) // 2
    # once a chunk, by each rank its half of the rows: forward, and the gradients back
    assert found.pipeline == 2 * 128 * (1000 + 2 * 3000) // 2
    # gradients scattered and weights gathered at each update
    assert found.data == 2 * (120_000 + 60_000) * 3 // 4
    assert found.expert == found.context == 0
    assert found.sync == 2 * PARAMETERS
    config.parallel.sequence, config.model.recompute, config.parallel.pipeline = False, "none", 1
    found = traffic_of(SIZES, config, WORK, shard(0), world_size=2, updates=2)
    assert found.tensor == 8 * 128 * (4 * 1000 + (4 + 4) * 3000) // 2
    assert (found.pipeline, found.data) == (0, 0)


def test_traffic_of_context_ranks(config: Config) -> None:
    """Keys and values of 2 heads of 8, bf16, 64 bytes a row, go to three others in each layer: in the forward
    pass, in the backward pass, and in the one that recomputes; once their gradients come back."""
    config.parallel.context = 4
    work = Work(replace(WORK.forward, shared_rows=100), replace(WORK.train, shared_rows=300))
    found = traffic_of(SIZES, config, work, shard(0), WORLD_SIZE, updates=2)
    assert found.context == 2 * 3 * 64 * (100 + (1 + 1 + 2) * 300)
    # the optimizer is sharded over data- and context-parallel ranks, as many as without context parallel
    assert found.data == 2 * (120_000 + 60_000) * 3 // 4
    config.model.recompute = "none"
    found = traffic_of(SIZES, config, work, shard(0), WORLD_SIZE, updates=2)
    assert found.context == 2 * 3 * 64 * (100 + (1 + 2) * 300)


def test_traffic_of_experts(config: Config) -> None:
    """Three experts a token on two ranks: half of the routed rows go out and come back, per layer, and in the
    pass that recomputes; the experts' weights are shared by half as many ranks as expert parallel leaves."""
    config.parallel.expert = 2
    sizes = replace(SIZES, experts=8, experts_a_token=3)
    of_experts = replace(shard(0), expert_weight_bytes=40_000, expert_gradient_bytes=80_000)
    found = traffic_of(sizes, config, WORK, of_experts, WORLD_SIZE, updates=1)
    assert found.expert == 2 * 2 * 128 * (3 * (1000 + 3 * 3000) // 2) // 2
    # experts take the rows that sequence parallel leaves a rank: only attention gathers and scatters
    assert found.tensor == 2 * 128 * (2 * 1000 + (2 + 3 + 2) * 3000) // 2
    assert found.data == 60_000 * 3 // 4 + 120_000 * 3 // 4
    config.parallel.expert = 8
    found = traffic_of(sizes, config, WORK, of_experts, WORLD_SIZE, updates=1)
    assert found.data == 60_000 * 3 // 4  # every rank of a stage has other experts
    config.model.recompute = "none"
    found = traffic_of(sizes, config, WORK, of_experts, WORLD_SIZE, updates=1)
    assert found.expert == 2 * 2 * 128 * (3 * (1000 + 2 * 3000) // 2) * 7 // 8


def test_seconds_of_a_step(plan: Plan, step: SyntheticStep) -> None:
    seconds, traffic = plan.seconds, plan.traffic
    (update,) = step.updates
    assert plan.micro_batches == len(update.trained["plain"].ranks[0])
    idle = 3 / 2  # stages beyond the first, by chunks
    assert plan.bubble == pytest.approx(idle / (plan.micro_batches + idle))
    busy = plan.flops / (2 * 4 * 1e9 * 0.4)
    assert seconds.compute == pytest.approx(busy * (plan.micro_batches + idle) / plan.micro_batches)
    assert seconds.tensor_traffic == pytest.approx(traffic.tensor / (1e6 * 0.8))
    assert seconds.pipeline_traffic == pytest.approx(traffic.pipeline / (1e5 * 0.8))
    # a stage's ranks are one host's
    assert seconds.data_traffic == pytest.approx(traffic.data / (1e6 * 0.8))
    # gathered over tensor ranks and from a stage, then through shared memory
    gathered = PARAMETERS / (1e6 * 0.8) + 2 * PARAMETERS / (1e5 * 0.8)
    assert seconds.sync == pytest.approx(gathered + 2 * PARAMETERS / 4e5)
    # 8 servers of 4 GPUs share 64 x 8 rollouts, and read their weights and half of the keys for each token
    weights = 2 * (8 * MATRICES_A_LAYER + 1000 * 64)
    keys = 64 * step.response_tokens / 512 / 2 * (2 * 2 * 8 * 4 * 8)
    rate = 4 * 1e6 * 0.6
    assert seconds.rollout == pytest.approx(step.longest_response * (weights + keys) / rate)
    assert seconds.step == pytest.approx(sum(vars(seconds).values()))


def test_tokens_and_fit(plan: Plan, step: SyntheticStep) -> None:
    stats = step.updates[0].trained["plain"].stats
    assert plan.parameters == PARAMETERS and plan.data_parallel == 4
    assert plan.tokens.saved == stats["tokens_rows"] - stats["tokens_packed"] > 0
    assert plan.fullest.peak == max(rank.peak for rank in plan.ranks)
    assert plan.fits
    small = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=plan.fullest.peak - 1))
    assert not replace(plan, cluster=small).fits


def test_only_layouts_that_fit_are_proposed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With shards of a given size, so that no process group is needed."""
    monkeypatch.setattr(planning, "build_shards", lambda *_, **__: [shard(0), shard(3)])
    monkeypatch.setattr(planning, "MIN_ROWS", 32)
    small = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=4.25e6))
    common = (config, HF_CONFIG, WORLD_SIZE)
    every, fitting = (
        planning.propose(*common, cluster, 4, UnknownTokenizer()) for cluster in (CLUSTER, small)
    )
    assert 0 < len(fitting) < len(every)
    assert all(plan.fullest.peak <= 4.25e6 for plan in fitting)
    seconds = [plan.seconds.step for plan in every]
    assert seconds == sorted(seconds)
    assert {plan.config.model.recompute for plan in every} == {"none", "selective", "full"}
    # four key-value heads are not cut eight ways; more stages than layers are none
    assert {plan.config.parallel.tensor for plan in every} <= {1, 2, 4}
    assert {plan.config.parallel.pipeline for plan in every} <= {1, 2, 4, 8}
    for plan in every:
        p = plan.config.parallel
        assert p.sequence == (p.tensor > 1) and p.virtual_pipeline <= max(1, 8 // p.pipeline)
        # a micro-batch has as many rows on any number of context ranks, and each of them at least MIN_ROWS
        assert p.context * plan.config.train.max_tokens_per_microbatch == 128
        assert p.context * p.tensor * p.pipeline * plan.data_parallel == WORLD_SIZE
    assert {plan.config.parallel.context for plan in every} == {1, 2, 4}
    assert min(plan.fullest.activations for plan in every if plan.config.parallel.context == 4) < min(
        plan.fullest.activations for plan in every if plan.config.parallel.context == 1
    )


def test_context_parallel_is_judged(plan: Plan) -> None:
    """By the fastest layout of each number of context ranks; plans come with the fastest first."""
    longer = replace(
        plan,
        config=replace(plan.config, parallel=replace(plan.config.parallel, context=2)),
        seconds=replace(plan.seconds, compute=plan.seconds.compute - 30, context_traffic=10),
    )
    slower = replace(longer, seconds=replace(longer.seconds, compute=plan.seconds.compute))
    *lines, judgement = planning.by_context([longer, plan, slower]).splitlines()
    assert [line.split()[0] for line in lines] == ["CP", "1", "2"]
    assert judgement == (
        "context parallel helps: 2 ranks against 1 change -20.0 s (compute -30.0, context traffic +10.0)"
    )
    assert "does not help: 2 ranks against 1 change +10.0 s" in planning.by_context([plan, slower])
    small = replace(longer.seconds, compute=plan.seconds.compute - 10 - 0.01 * plan.seconds.step)
    near = replace(longer, seconds=small)
    assert "makes no noticeable difference: 2 ranks" in planning.by_context([near, plan])
    assert "context parallel: no layout with it fits" in planning.by_context([plan])
    assert "is needed: no layout without it fits; 2 ranks" in planning.by_context([longer, slower])
