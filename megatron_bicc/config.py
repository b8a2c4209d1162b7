"""Settings of what is learned from rollouts: reward, BICC, RCC, loss.

Settings of the policy: its weights, its prompts, its layout over processes, its training.

Settings of the rollouts, and of the servers that they come from.

Settings of what a run measures, keeps and shows.

Every setting of a run: nested dataclasses, read from YAML and `section.name=value` overrides.

A setting of None takes its value from the preset that `algorithm` names
(megatron_bicc.algorithms.presets).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Advantage = Literal["normalized", "centered"]
Aggregation = Literal["sequence_mean", "constant", "token_mean"]
KlEstimator = Literal["k1", "k2", "k3"]
RccForm = Literal["first_order", "exact"]
DeltaKind = Literal["token_mean", "sequence_sum"]
ContextSource = Literal["partition", "pair"]
Truncation = Literal["equal", "in_order"]
Keep = Literal["head", "tail", "both_ends"]


@dataclass
class RewardConfig:
    """Scoring of a finished response."""

    verifier: str = "math"
    """Name of a registered verifier (megatron_bicc.rewards)."""
    answer: Literal["auto", "boxed", "answer_line", "hash", "last_number"] = "auto"
    r"""How a final answer is marked: \boxed{X}, Answer: X, #### X, the last number; auto: the first three."""
    threshold: float = 0.5
    """A rollout is correct if its reward is greater than this."""
    overlong_penalty: float | None = None
    """Taken off the reward of a response as long as max_new_tokens; 0 is off; None: as the preset says."""
    overlong_share: float = 0.2
    """Last share of rollout.max_new_tokens, over which that penalty grows from 0."""


@dataclass
class BiccConfig:
    """Bilateral Context Conditioning (arXiv 2603.13134, section on BICC)."""

    enabled: bool | None = None
    """Train each response with the opposite partition in its context; None: as the preset says."""
    denominator: Literal["plain", "conditioned"] = "plain"
    """pi_old of the ratio: given the prompt alone (the paper), or given the same context."""
    weight: float = 1.0
    """w in J = w J_bicc + (1 - w) J_grpo, within [0, 1]; 1 is the paper."""
    context_ratio: float = 0.4
    """Share of train.max_sequence_tokens that a context may take, within [0, 1]."""
    context_source: Literal["partition", "pair"] = "partition"
    """The whole opposite partition in one context, or one opposite rollout a context."""
    truncation: Literal["equal", "in_order"] = "equal"
    """Opposite rollouts share the budget equally, or fill it one after another."""
    keep: Literal["head", "tail", "both_ends"] = "head"
    """The part of a truncated opposite rollout that stays."""
    wrong_header: str = "\n\nAn incorrect attempt:\n"
    """Text before each incorrect rollout in a context."""
    right_header: str = "\n\nA correct attempt:\n"
    """Text before each correct rollout in a context."""
    answer_header: str = "\n\nAnswer:\n"
    """Text between the context and the response that is trained."""


@dataclass
class RccConfig:
    """Reward-Confidence Correction of the baseline (arXiv 2603.13134, section on RCC)."""

    enabled: bool | None = None
    """Correct the baseline; None: as the preset says."""
    form: Literal["first_order", "exact"] = "first_order"
    """E[R] + 2 Cov(R, delta) (the paper), or the self-normalised E[w^2 R] / E[w^2]."""
    delta: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Confidence of a rollout: mean or sum of its token log-ratios."""
    reference: Literal["ref", "rollout"] = "ref"
    """Log-ratio against the frozen reference policy, or against the rollout engine."""


@dataclass
class LossConfig:
    """The three choices that make a variant, and what may be added. None: as the preset says."""

    advantage: Literal["normalized", "centered"] | None = None
    """(r - b) / std of the group, or r - b."""
    objective: str | None = None
    """token, sequence, geometric, aspo or cispo (docs/algorithms.md); or an import path."""
    baseline: str = "mean"
    """Baseline of a group's rewards: mean, or an import path; rcc.enabled corrects the mean."""
    clip_low: float | None = None
    """Lower clip distance: the ratio is clipped at 1 - clip_low (geometric: log ratio at -clip_low)."""
    clip_high: float | None = None
    """Upper clip distance: the ratio is clipped at 1 + clip_high (geometric: log ratio at clip_high)."""
    dual_clip: float | None = None
    """c > 1 bounds the loss of a token with negative advantage by c |A|; 0 is off."""
    aggregation: Literal["sequence_mean", "constant", "token_mean"] | None = None
    """Mean over tokens then sequences; sum over tokens by max_new_tokens; mean over all tokens."""
    kl_coefficient: float = 0.0
    """Weight of the KL penalty towards the reference policy; 0 is off."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of that KL; None: the one whose gradient is the KL's, k2 in the loss, k1 in the reward."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty enters: at every token, also of groups without contrast; or off the reward."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, also in groups without contrast; 0 is off."""
    tis_cap: float = 0.0
    """Cap c of the truncated importance weight min(pi_old / mu, c) for engine mismatch; 0 is off."""


@dataclass
class ModelConfig:
    """The policy."""

    path: str = ""
    """Hugging Face directory of the policy: config.json, tokenizer and safetensors."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in the forward and backward pass; the optimiser keeps fp32 copies."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping."""


@dataclass
class DataConfig:
    """Prompts to train on."""

    train: str = ""
    """Training prompts: .parquet or .jsonl in the DAPO-Math-17k, GSM8K or MATH schema."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens, chat template included."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What to do with a longer prompt."""
    filter: str = ""
    """Import path of a function that says which training prompts to keep; empty: all."""
    instruction: str = ""
    """Text put after every training question, such as how to mark the final answer."""
    control_tokens: Literal["refuse", "text", "keep"] = "refuse"
    """A control token in a prompt's text, <|im_end|>: an error, ordinary text, or the control token."""
    date: str = ""
    """Date that a chat template gets for today's, YYYY-MM-DD; empty: that of the run's first start."""


@dataclass
class ParallelConfig:
    """How the policy is laid out over the processes; data parallel takes what is left."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallel beside tensor parallel."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks a pipeline stage."""
    expert: int = 1
    """Expert-parallel size."""
    context: int = 1
    """Context-parallel size; only 1 is supported."""
    silence_seconds: float = 30.0
    """A host that is not heard of for so long, at least 5, ends the run; 0 waits for collectives to fail."""


@dataclass
class TrainConfig:
    """The shape of a training step."""

    steps: int = 100
    """Batches of rollouts to learn from."""
    updates_per_step: int = 1
    """Optimiser steps that a batch of rollouts is cut into, by groups."""
    max_sequence_tokens: int = 4096
    """Longest training sequence: prompt, context and response together."""
    max_tokens_per_microbatch: int = 16384
    """Rows that a packed micro-batch may hold."""


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay, by megatron-core's distributed optimizer."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate that a decaying schedule reaches after the last optimizer step; no floor of warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """W optimiser steps of linear warm-up: step u has u / W of the peak."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices, embeddings and experts included; none of norms and biases."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is off."""


@dataclass
class SglangConfig:
    """The rollout servers of rollout.engine=sglang (docs/rollout.md)."""

    servers: str = ""
    """attach: the servers' URLs, separated by commas, http://host:port each."""
    servers_per_node: int = 1
    """spawn: servers that the first process of each node starts."""
    host: str = "127.0.0.1"
    """spawn: address of the servers. Loopback: for their own node; 0.0.0.0: each node's, for all."""
    python: str = ".venv-sglang/bin/python"
    """spawn: Python of the environment that SGLang is installed in."""
    server_args: str = ""
    """spawn: more arguments of sglang.launch_server."""
    gpus: str = ""
    """spawn: GPUs of each of a node's servers, "0,1/2,3" for two servers; empty: all that are visible."""
    max_concurrency: int = 256
    """Rollouts asked for at a time, over all processes and servers."""
    start_timeout_s: float = 900.0
    """Seconds within which every server must be ready."""
    health_timeout_s: float = 30.0
    """Seconds within which a server must say that it is well, or it is taken for dead."""
    request_timeout_s: float = 3600.0
    """Seconds that a group of rollouts may take."""
    retry_s: float = 300.0
    """Seconds of failing attempts, on any server, after which the run stops."""
    api_key_variable: str = ""
    """attach: environment variable that holds the servers' API key."""


@dataclass
class RolloutConfig:
    """Generation of the rollouts that the policy learns from."""

    engine: str = "local"
    """local: transformers' generate, in the training processes; sglang: SGLang servers; or an import path."""
    launch: Literal["spawn", "attach"] = "spawn"
    """sglang: servers that the run starts and ends, or those of rollout.sglang.servers."""
    colocate: bool = False
    """sglang: the servers give up their memory while the policy trains on the same devices."""
    prompts_per_step: int = 32
    """Prompts (groups) sampled for every batch of rollouts."""
    group_size: int = 8
    """G: rollouts of each prompt."""
    max_new_tokens: int = 2048
    """Longest response in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    batch_size: int = 256
    """Rollouts that the local engine generates, and megatron_bicc.evaluate asks for, at once."""
    dynamic_sampling: bool | None = None
    """Draw prompts until prompts_per_step groups have right and wrong rollouts; None: as the preset says."""
    max_prompts_per_step: int = 320
    """Most prompts that dynamic sampling draws for a step; fewer groups than it needs by then is an error."""
    leftover: Literal["drop", "keep"] = "drop"
    """Groups with contrast beyond prompts_per_step: dropped, or learned from in the next step."""
    sglang: SglangConfig = field(default_factory=SglangConfig)


@dataclass
class WeightSyncConfig:
    """The policy's weights on their way to the rollout servers, after every step."""

    method: Literal["tensor", "disk", "distributed"] = "tensor"
    """Bytes by HTTP; files that the servers read; or a broadcast among trainer and servers."""
    bucket_mb: float = 512.0
    """Weights are sent in buckets of this size, in MiB; a larger tensor is one by itself."""
    path: str = ""
    """Directory for files of weights, on a disk or in memory; empty: rollout_weights in output_dir."""
    keep_files: bool = True
    """Keep the newest weights in files until the next sync, for a server that restarts before it."""
    timeout_s: float = 600.0
    """Seconds that a server may take for one call of a sync."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation, sampled: while training, and by megatron_bicc.evaluate."""

    data: str = ""
    """Held-out prompts in any schema that data.train takes; empty: no evaluation."""
    every: int = 10
    """Steps between evaluations; step 0 and the last are always evaluated."""
    samples: int = 4
    """Samples a prompt, averaged."""
    temperature: float = 1.0
    """Sampling temperature."""
    instruction: str = ""
    """Text put after every held-out question, such as how to mark the final answer."""
    prompts: int = 0
    """Use only the first so many prompts; 0 is all."""


@dataclass
class CheckpointConfig:
    """Saved state of the run."""

    every: int = 50
    """Steps between checkpoints; the last step is always saved; 0: only the last."""
    keep: int = 2
    """Newest checkpoints to keep."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    force: bool = False
    """Go on although settings have changed that make another experiment of the run."""


@dataclass
class ExportConfig:
    """The policy in Hugging Face format while it is trained; output_dir/hf holds it at the end."""

    every: int = 0
    """Steps between exports to output_dir/exports/step_N; 0: none but that at the end."""
    keep: int = 2
    """Newest of these exports to keep."""


@dataclass
class MonitoringConfig:
    """What the run writes beside metrics.jsonl and report.html."""

    tensorboard: bool = True
    """Write a TensorBoard directory."""
    wandb_project: str = ""
    """Weights & Biases project; empty is off."""
    report_groups: int = 6
    """Groups that every evaluation records for report.html."""
    reference: bool = False
    """Compute the reference policy's log-probs, for rcc/cov and delta/*, where the algorithm needs none."""
    compare: str = ""
    """Another run's directory, which report.html sets beside this one."""


@dataclass
class SyntheticConfig:
    """Rollouts that a dry run and tools/plan.py suppose: log-normal lengths, cut to the run's limits."""

    prompt_tokens: int | None = None
    """Mean length of a prompt; None: a quarter of data.max_prompt_tokens."""
    prompt_sigma: float = 0.5
    """Standard deviation of the logarithm of a prompt's length."""
    response_tokens: int | None = None
    """Mean length of a response; None: half of rollout.max_new_tokens."""
    response_sigma: float = 0.5
    """Standard deviation of the logarithm of a response's length."""
    pass_rate: float = 0.5
    """Share of rollouts that are correct, within [0, 1]; each is so by itself."""


@dataclass
class Config:
    """A run of megatron_bicc."""

    output_dir: str = "runs/default"
    """Directory of this run: metrics.jsonl, checkpoints, report.html."""
    seed: int = 1
    """Seed of data order, sampling and initialisation."""
    algorithm: str = "bicc"
    """grpo, dr_grpo, dapo, gspo, gmpo, aspo or cispo, with +bicc and +rcc; bicc means grpo+bicc+rcc."""
    dry_run: bool = False
    """Check all that start-up would, every rank's shard and a synthetic step, without a GPU; then stop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    bicc: BiccConfig = field(default_factory=BiccConfig)
    rcc: RccConfig = field(default_factory=RccConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, from dataclasses.asdict of a Config."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
