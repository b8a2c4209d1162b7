"""Every setting of a run: nested dataclasses with the default, type, range and meaning of each.

A setting is described at its field only. The type gives the choices (`Literal`), `setting(...)` the range and
whether a change affects a resumed run or a score, and the string below the field the meaning.
--help, the checks at start-up, checkpoint.resume and megatron_bicc.evaluate read them by `settings()`. Checks
that involve several settings are in `check`.

A setting of None takes its value from the preset that `algorithm` names (megatron_bicc.algorithms.presets).
"""

import ast
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from datetime import date
from difflib import get_close_matches
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args, get_origin

from megatron_bicc.errors import UserError, shortened
from megatron_bicc.plugins import is_import_path

AnswerStyle: TypeAlias = Literal["auto", "boxed", "answer_line", "hash", "last_number"]
Denominator: TypeAlias = Literal["plain", "conditioned"]
ContextSource: TypeAlias = Literal["partition", "pair"]
Truncation: TypeAlias = Literal["equal", "in_order"]
Keep: TypeAlias = Literal["head", "tail", "both_ends"]
RccForm: TypeAlias = Literal["first_order", "exact"]
DeltaKind: TypeAlias = Literal["token_mean", "sequence_sum"]
Advantage: TypeAlias = Literal["normalized", "centered"]
Aggregation: TypeAlias = Literal["sequence_mean", "constant", "token_mean"]
KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
CorrectionName: TypeAlias = Literal[
    "none", "token_tis", "sequence_tis", "token_mask", "sequence_mask", "geometric_mask"
]
OverlongAction: TypeAlias = Literal["error", "drop"]
ControlTokens: TypeAlias = Literal["refuse", "text", "keep"]
PauseMode: TypeAlias = Literal["in_place", "retract", "abort"]

RENAMED = MappingProxyType(
    {
        "monitoring.compare": "monitoring.compare_run",
        "parallel.silence_seconds": "parallel.heartbeat_timeout_s",
        "reward.overlong_share": "reward.overlong_buffer",
        "rollout.sglang.retry_s": "rollout.sglang.retry_timeout_s",
    }
)
"""Former names of settings, and the present ones. A former name is an error that gives the present one."""


@dataclass(frozen=True)
class Rule:
    """The values that a setting accepts beyond its type, and what a change of it affects."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    zero_is_off: bool = False
    """0 is accepted whatever the range, and turns the feature off."""
    named: tuple[str, ...] = ()
    """Built-in names of a text setting that otherwise takes an import path; "" means empty."""
    form: Callable[[str], bool] | None = None
    """Additional check of a text; `form_in_words` describes it."""
    form_in_words: str = ""
    reason: str = ""
    """Reason for the range, for the error message."""
    changes_experiment: bool = False
    """A resumed run with another value would be another experiment: refused without checkpoint.force."""
    decides_score: bool = False
    """Part of what defines a score of megatron_bicc.evaluate: answers under another value are not reused."""

    @property
    def remedy(self) -> str:
        """The accepted range in words, such as "at least 1"; empty without a constraint."""
        if self.at_least is not None and self.at_most is not None:
            return f"within {self.at_least} and {self.at_most}"
        limits = {
            "at least": self.at_least,
            "greater than": self.above,
            "at most": self.at_most,
            "less than": self.below,
        }
        words = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        return f"{words}, or 0 for off" if self.zero_is_off else words

    def admits(self, value: Any) -> bool:
        """Returns whether a number is within the range; NaN never is."""
        if self.zero_is_off and value == 0:
            return True
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any, **rule: Any) -> Any:
    """Declares a setting: its default and the arguments of its `Rule`."""
    return field(default=default, metadata={"rule": Rule(**rule)})


def mapping() -> Any:
    """Declares a mapping of names that are not listed here; each is set as SECTION.MAPPING.NAME=value."""
    return field(default_factory=dict, metadata={"rule": Rule()})


def section(cls: type, changes_experiment: bool = False) -> Any:
    """Declares a section of settings. changes_experiment: holds for each of its settings."""
    return field(default_factory=cls, metadata={"changes_experiment": changes_experiment})


def _is_date(text: str) -> bool:
    try:
        return not text or date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass
class RewardConfig:
    """Scoring of a finished response."""

    verifier: str = setting("math", named=("math",), decides_score=True)
    """Function that scores responses; math compares final answers (docs/rewards.md)."""
    answer: AnswerStyle = setting("auto", decides_score=True)
    r"""Format of a final answer: \boxed{X}, Answer: X, #### X, last number; auto: one of the first three."""
    threshold: float = setting(0.5, decides_score=True)
    """A rollout is correct if its reward is greater than this."""
    overlong_penalty: float | None = setting(None, at_least=0)
    """Penalty subtracted from the reward of a response of max_new_tokens tokens; 0 is off; null: preset."""
    overlong_buffer: float = setting(0.2, above=0, at_most=1)
    """Last fraction of rollout.max_new_tokens, over which that penalty grows linearly from 0."""


@dataclass
class BiccConfig:
    """Bilateral Context Conditioning (arXiv 2603.13134, section on BICC)."""

    enabled: bool | None = None
    """Train each response with the opposite partition in its context; null: preset."""
    denominator: Denominator = "plain"
    """Context of pi_old in the ratio: the prompt alone (the paper), or the same context as pi."""
    weight: float = setting(1.0, at_least=0, at_most=1)
    """w in J = w J_bicc + (1 - w) J_grpo; 1 is the paper."""
    context_ratio: float = setting(0.4, at_least=0, at_most=1)
    """Largest fraction of train.max_sequence_tokens that a context takes."""
    context_source: ContextSource = "partition"
    """All rollouts of the opposite partition in one context, or one opposite rollout per context."""
    truncation: Truncation = "equal"
    """Opposite rollouts share the context's token budget equally, or fill it one after another."""
    keep: Keep = "head"
    """Part of a truncated opposite rollout that is kept."""
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
    """Correct the baseline; null: preset."""
    form: RccForm = "first_order"
    """E[R] + 2 Cov(R, delta) (the paper), or the self-normalised E[w^2 R] / E[w^2]."""
    delta: DeltaKind = "token_mean"
    """Confidence of a rollout: mean or sum of its token log-ratios."""
    reference: Literal["ref", "rollout"] = "ref"
    """Log-ratio against the frozen reference policy, or against the rollout engine."""


@dataclass
class LossConfig:
    """Advantage, objective and aggregation, which make an algorithm, and optional terms; null: preset."""

    advantage: Advantage | None = None
    """(r - b) / std of the group, or r - b."""
    objective: str | None = setting(None, named=("token", "sequence", "geometric", "aspo", "cispo"))
    """Policy-gradient objective (docs/algorithms.md)."""
    baseline: str = setting("mean", named=("mean",))
    """Baseline b of a group's rewards; rcc.enabled corrects the mean."""
    clip_low: float | None = setting(None, at_least=0)
    """Lower clip distance: the ratio is clipped at 1 - clip_low (geometric: log ratio at -clip_low)."""
    clip_high: float | None = setting(None, at_least=0)
    """Upper clip distance: the ratio is clipped at 1 + clip_high (geometric: log ratio at clip_high)."""
    dual_clip: float | None = setting(None, above=1, zero_is_off=True)
    """Dual-clip coefficient c: caps the loss of negative-advantage tokens at c |A|."""
    aggregation: Aggregation | None = None
    """Mean over tokens, then sequences; sum over tokens divided by max_new_tokens; mean over all tokens."""
    kl_coefficient: float = setting(0.0, at_least=0)
    """Weight of the KL penalty against the reference policy; 0 is off."""
    kl_estimator: KlEstimator | None = None
    """Estimator of that KL; null: the one with the KL's gradient, k2 in the loss, k1 in the reward."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Penalise every token in the loss, also in groups without contrast; or subtract from the reward."""
    entropy_coefficient: float = setting(0.0, at_least=0)
    """Weight of the entropy bonus, also in groups without contrast; 0 is off."""
    load_balancing_coefficient: float = setting(0.0, at_least=0)
    """Experts: weight of the load-balancing loss of every layer's router; 0 is off."""
    z_loss_coefficient: float = setting(0.0, at_least=0)
    """Experts: weight of the z-loss, which keeps the logits of every layer's router small; 0 is off."""
    correction: CorrectionName = "none"
    """Weights for what the rollout engine or older weights sampled, from pi_old / mu (docs/algorithms.md)."""
    correction_low: float | None = setting(None, at_least=0)
    """Lower bound of the correction's ratio, 0 for none; null: the correction's default."""
    correction_high: float | None = setting(None, above=0, at_most=1e6)
    """Upper bound of the correction's ratio; null: the correction's default."""
    correction_veto: float = setting(0.0, at_least=0, below=1)
    """A response with a token whose pi_old / mu is less than this has weight 0; 0 is off."""


@dataclass
class ModelConfig:
    """The policy."""

    path: str = setting("", changes_experiment=True)
    """Hugging Face directory of the policy: config.json, tokenizer and safetensors."""
    dtype: Literal["float32", "bfloat16"] = setting("bfloat16", changes_experiment=True, decides_score=True)
    """Type of the weights in the forward and backward pass; the optimizer keeps fp32 copies."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes instead of storing them."""
    kernels: Literal["auto", "torch"] = "auto"
    """csrc's CUDA kernels where they are built and a GPU trains, or plain torch everywhere."""
    attention: Literal["auto", "fa2", "fa3", "fa4"] = "auto"
    """CUDA, 16 bits: flash attention of torch (fa2) or an installed package; auto: the newest that fits."""
    routing_replay: Literal["none", "old", "engine"] = setting("none", changes_experiment=True)
    """Experts: replay the routing of the old policy's pass in training (R2), or the engine's in all (R3)."""
    reference: Literal["auto", "host", "device"] = "auto"
    """Memory of the reference policy's weights; auto: the GPU's if they take a quarter of what is free."""


@dataclass
class DataConfig:
    """Training prompts."""

    train: str = ""
    """Training prompts: .parquet or .jsonl in the DAPO-Math-17k, GSM8K or MATH schema."""
    max_prompt_tokens: int = setting(1024, at_least=1, decides_score=True)
    """Longest prompt in tokens, chat template included."""
    overlong_prompts: OverlongAction = setting("error", decides_score=True)
    """Raise an error for a longer prompt, or drop it."""
    filter: str = setting("", named=("",))
    """Function that returns whether a training prompt is used; empty: all are."""
    instruction: str = ""
    """Text appended to every training question, such as the format of the final answer."""
    control_tokens: ControlTokens = setting("refuse", decides_score=True)
    """Control tokens such as <|im_end|> in a prompt's text: an error, encoded as text, or kept as tokens."""
    date: str = setting("", form=_is_date, form_in_words="a date, YYYY-MM-DD, or empty", decides_score=True)
    """Date that chat templates get as today's, YYYY-MM-DD; empty: the day the run first started."""


@dataclass
class ParallelConfig:
    """Layout of the policy; data-parallel size = number of processes / (tensor x context x pipeline)."""

    tensor: int = setting(1, at_least=1)
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallel, which needs tensor parallel."""
    pipeline: int = setting(1, at_least=1)
    """Pipeline-parallel size."""
    virtual_pipeline: int = setting(1, at_least=1)
    """Model chunks per pipeline stage."""
    expert: int = setting(1, at_least=1)
    """Expert-parallel size."""
    context: int = setting(1, at_least=1)
    """Context-parallel size: ranks that share the rows of a micro-batch; for long sequences."""
    heartbeat_timeout_s: float = setting(
        30.0, at_least=5, zero_is_off=True, reason="hosts send a heartbeat every 2 seconds"
    )
    """The run ends after this many seconds without a heartbeat from a host; 0: its collectives time out."""


@dataclass
class MegatronConfig:
    """Fields of megatron-core's own dataclasses, by their names there (docs/policy.md)."""

    transformer: dict[str, Any] = mapping()
    """TransformerConfig: recomputation, offload of activations, fp8, fused kernels, dispatch of experts."""
    ddp: dict[str, Any] = mapping()
    """DistributedDataParallelConfig: buckets and overlap of the gradient reduction."""
    optimizer: dict[str, Any] = mapping()
    """OptimizerConfig: offload of the optimizer to the host, types of its state."""


@dataclass
class TrainConfig:
    """Shape of a training step."""

    steps: int = setting(100, at_least=1)
    """Training steps, each of one batch of rollouts."""
    updates_per_step: int = setting(1, at_least=1, changes_experiment=True)
    """Optimizer steps per batch of rollouts, which is split by groups."""
    max_sequence_tokens: int = setting(4096, at_least=1, below=2**31, changes_experiment=True)
    """Longest training sequence in tokens: prompt, context and response together."""
    max_tokens_per_microbatch: int = setting(16384, at_least=1, below=2**31)
    """Largest packed micro-batch in tokens, on each context-parallel rank."""


@dataclass
class OptimizerConfig:
    """AdamW in megatron-core's distributed optimizer."""

    lr: float = setting(1e-6, at_least=0)
    """Peak learning rate."""
    min_lr: float = setting(0.0, at_least=0)
    """Learning rate of a cosine or linear schedule after the last optimizer step; warm-up starts from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = setting(0, at_least=0)
    """Optimizer steps W of linear warm-up: step u has u / W of the peak."""
    beta1: float = setting(0.9, at_least=0, below=1)
    """Decay rate of Adam's first moment."""
    beta2: float = setting(0.999, at_least=0, below=1)
    """Decay rate of Adam's second moment."""
    eps: float = setting(1e-8, above=0)
    """Adam's epsilon."""
    weight_decay: float = setting(0.0, at_least=0)
    """Decoupled weight decay of all matrices, embeddings and experts included; norms and biases have none."""
    clip_grad: float = setting(1.0, at_least=0)
    """Largest global gradient norm; 0 is off."""


@dataclass
class SglangConfig:
    """SGLang servers of rollout.engine=sglang (docs/rollout.md)."""

    servers: str = ""
    """attach: URLs of servers or of SGLang's routers, http://host:port each, separated by commas."""
    servers_per_node: int = setting(1, at_least=1)
    """spawn: servers per node, started by its first process."""
    host: str = "127.0.0.1"
    """spawn: IPv4 address of the servers. Loopback: reached from their own node; 0.0.0.0: from all nodes."""
    python: str = ".venv-sglang/bin/python"
    """spawn: Python of the environment that SGLang is installed in."""
    server_args: str = ""
    """spawn: more arguments of sglang.launch_server."""
    gpus: str = ""
    """spawn: GPUs of each server of a node, "0,1/2,3" for two servers; empty: all visible GPUs."""
    max_concurrency: int = setting(256, at_least=1)
    """Rollouts in flight at a time, over all processes and servers."""
    start_timeout_s: float = setting(900.0, above=0)
    """Seconds until every server must be ready."""
    health_timeout_s: float = setting(30.0, above=0)
    """Health-check timeout in seconds."""
    request_timeout_s: float = setting(3600.0, above=0)
    """Timeout in seconds of the request for a group of rollouts."""
    retry_timeout_s: float = setting(300.0, above=0)
    """Seconds without a successful request to any server after which the run stops."""
    api_key_variable: str = ""
    """attach: environment variable that contains the servers' API key."""


@dataclass
class RolloutConfig:
    """Generation of the rollouts that the policy is trained on."""

    engine: str = setting("local", named=("local", "sglang"), decides_score=True)
    """local: transformers' generate in the training processes; sglang: SGLang servers."""
    launch: Literal["spawn", "attach"] = "spawn"
    """sglang: start servers with the run and end them with it, or use those of rollout.sglang.servers."""
    colocate: bool = False
    """sglang: servers release their GPU memory while the policy trains on the same devices."""
    prompts_per_step: int = setting(32, at_least=1, at_most=2**20, changes_experiment=True)
    """Prompts (groups) per step."""
    group_size: int = setting(
        8,
        at_least=2,
        at_most=2**20,
        changes_experiment=True,
        reason="advantages compare rollouts of one group",
    )
    """Rollouts per prompt."""
    max_new_tokens: int = setting(2048, at_least=1, changes_experiment=True, decides_score=True)
    """Longest response in tokens, the end-of-sequence token included."""
    temperature: float = setting(1.0, above=0, changes_experiment=True)
    """Sampling temperature; log-probs are taken at the same temperature."""
    batch_size: int = setting(256, at_least=1, decides_score=True)
    """Rollouts per generate call of the local engine and per request batch of megatron_bicc.evaluate."""
    dynamic_sampling: bool | None = setting(None, changes_experiment=True)
    """Sample prompts until prompts_per_step groups have right and wrong rollouts; null: preset."""
    max_prompts_per_step: int = setting(320, at_least=1)
    """Maximum prompts per step of dynamic sampling; the run stops if they yield too few groups."""
    leftover: Literal["drop", "keep"] = setting("drop", changes_experiment=True)
    """Groups with contrast beyond prompts_per_step: drop them, or keep them for the next step."""
    max_staleness: int = setting(0, at_least=0, changes_experiment=True)
    """Weight versions that trained rollouts may be behind; above 0, servers generate during training."""
    pause: PauseMode = setting("abort", changes_experiment=True)
    """max_staleness > 0: a weight sync pauses requests with their KV cache, without it, or resends them."""
    sglang: SglangConfig = section(SglangConfig)


@dataclass
class WeightSyncConfig:
    """Transfer of the policy's weights to the rollout servers after every step."""

    method: Literal["auto", "tensor", "disk", "distributed"] = "auto"
    """tensor: memory shared with servers of the same host; distributed: a broadcast; disk: files that the
    servers read; auto: tensor for servers on the sender's host, distributed for the others."""
    bucket_mb: float = setting(512.0, at_least=1, reason="each bucket is one request to every server")
    """Size of a bucket of weights in MiB; a larger tensor gets its own bucket."""
    path: str = ""
    """Directory for weight files, on a disk or in memory; empty: output_dir/rollout_weights."""
    keep_files: bool = False
    """Write the weights to files at every sync, too, for a server that restarts before the next one."""
    timeout_s: float = setting(600.0, above=0)
    """Timeout in seconds of one request of a sync."""
    delta: bool = False
    """Send files of the elements that changed, of bf16 weights, to servers started by the run."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation by sampling, during training and by megatron_bicc.evaluate."""

    data: str = ""
    """Held-out prompts in any schema that data.train accepts; empty: no evaluation."""
    every: int = setting(10, at_least=1)
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    samples: int = setting(4, at_least=1, decides_score=True)
    """Samples per prompt, averaged."""
    temperature: float = setting(1.0, above=0, decides_score=True)
    """Sampling temperature."""
    instruction: str = setting("", decides_score=True)
    """Text appended to every held-out question, such as the format of the final answer."""
    prompts: int = setting(0, at_least=0, decides_score=True)
    """Number of prompts to use, from the first; 0: all."""


@dataclass
class CheckpointConfig:
    """Checkpoints of the run."""

    every: int = setting(50, at_least=0)
    """Steps between checkpoints; the last step is always saved; 0: only the last."""
    keep: int = setting(2, at_least=1)
    """Newest checkpoints to keep."""
    resume: bool = False
    """Resume from the newest checkpoint in output_dir."""
    force: bool = False
    """Resume although settings have changed that make this another experiment."""


@dataclass
class ExportConfig:
    """Hugging Face exports during training; the final policy is always exported to output_dir/hf."""

    every: int = setting(0, at_least=0)
    """Steps between exports to output_dir/exports/step_N; 0: only the final one."""
    keep: int = setting(2, at_least=1)
    """Newest of these exports to keep."""


@dataclass
class MonitoringConfig:
    """Records of a run besides metrics.jsonl and report.html."""

    tensorboard: bool = True
    """Write a TensorBoard directory."""
    wandb_project: str = ""
    """Weights & Biases project; empty: off."""
    report_groups: int = setting(6, at_least=0)
    """Groups that each evaluation records for report.html."""
    reference: bool = False
    """Compute the reference policy's log-probs, for rcc/cov and delta/*, even if the algorithm needs none."""
    compare_run: str = ""
    """Directory of another run, shown beside this one in report.html."""


@dataclass
class SyntheticConfig:
    """Rollouts assumed by a dry run and tools/plan.py: log-normal lengths, cut to the run's limits."""

    prompt_tokens: int | None = setting(None, at_least=1)
    """Mean prompt length in tokens; null: a quarter of data.max_prompt_tokens."""
    prompt_sigma: float = setting(0.5, at_least=0)
    """Standard deviation of the logarithm of a prompt's length."""
    response_tokens: int | None = setting(None, at_least=1)
    """Mean response length in tokens; null: half of rollout.max_new_tokens."""
    response_sigma: float = setting(0.5, at_least=0)
    """Standard deviation of the logarithm of a response's length."""
    pass_rate: float = setting(0.5, at_least=0, at_most=1)
    """Probability that a rollout is correct, independently."""


@dataclass
class Config:
    """A run of megatron_bicc."""

    output_dir: str = "runs/default"
    """Directory of this run: metrics.jsonl, checkpoints, report.html."""
    seed: int = setting(1, at_least=0, below=2**31, changes_experiment=True, decides_score=True)
    """Seed of data order, sampling and initialisation."""
    algorithm: str = setting("bicc", changes_experiment=True)
    """grpo, dr_grpo, dapo, gspo, gmpo, aspo or cispo, with +bicc and +rcc; bicc means grpo+bicc+rcc."""
    dry_run: bool = False
    """Check the settings, the files, every rank's shard and a synthetic step without a GPU, then stop."""
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig, changes_experiment=True)
    rollout: RolloutConfig = section(RolloutConfig)
    weight_sync: WeightSyncConfig = section(WeightSyncConfig)
    reward: RewardConfig = section(RewardConfig, changes_experiment=True)
    bicc: BiccConfig = section(BiccConfig, changes_experiment=True)
    rcc: RccConfig = section(RccConfig, changes_experiment=True)
    loss: LossConfig = section(LossConfig, changes_experiment=True)
    parallel: ParallelConfig = section(ParallelConfig)
    train: TrainConfig = section(TrainConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    megatron: MegatronConfig = section(MegatronConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    export: ExportConfig = section(ExportConfig)
    monitoring: MonitoringConfig = section(MonitoringConfig)
    synthetic: SyntheticConfig = section(SyntheticConfig)


@dataclass(frozen=True)
class Setting:
    """A setting as its field describes it."""

    name: str
    """Dotted name, such as rollout.group_size."""
    type: Any
    default: Any
    help: str
    rule: Rule

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping, whose names are set one by one."""
        return get_origin(self.type) is dict

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that the type lists, as text; empty for a number or free text."""
        parts = [self.type] if get_origin(self.type) in (None, Literal) else get_args(self.type)
        spelled = {bool: ("true", "false"), type(None): ("null",)}
        return tuple(choice for part in parts for choice in spelled.get(part, get_args(part)))

    @property
    def expected(self) -> str:
        """The accepted values in words: choices, type and range."""
        if self.is_mapping:
            return "a mapping of names to values"
        words = {int: "a whole number", float: "a number", str: self.rule.form_in_words or "text"}
        free = [f"{words[kind]} {self.rule.remedy}".strip() for kind in self._free_types]
        if self.rule.named:
            parts = [
                *(name or "empty" for name in self.rule.named),
                *self.choices,
                "an import path, module:name",
            ]
        else:
            parts = [*free, *self.choices]
        return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))

    @property
    def metavar(self) -> str:
        """The accepted values for --help: choices, or the type."""
        free = [*filter(None, self.rule.named), "module:name"] if self.rule.named else self._free_types
        return "|".join([kind if isinstance(kind, str) else kind.__name__ for kind in free] + [*self.choices])

    @property
    def usage(self) -> str:
        """Meaning, range and default, for --help."""
        limits = f"{self.rule.remedy}; " if self.rule.remedy else ""
        return f"{self.help} [{limits}default {json.dumps(self.default)}]"

    def check(self, value: Any) -> None:
        """Raises UserError, one line with name, value and remedy, for a value that is not accepted."""
        if value is None and "null" in self.choices:
            return
        if self.is_mapping:
            if not isinstance(value, dict):
                raise UserError(f"{self.name} is {value!r}; it must be {self.expected}")
        elif isinstance(value, str):
            self._check_text(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.name} is {value}; it must be finite")
        elif not self.rule.admits(value):
            reason = f": {self.rule.reason}" if self.rule.reason else ""
            raise UserError(f"{self.name} is {value}; it must be {self.rule.remedy}{reason}")

    def _check_text(self, text: str) -> None:
        if "\0" in text:
            raise UserError(f"{self.name} is {text!r}; it must not contain a NUL character")
        if self.rule.named:
            accepted = text in self.rule.named or is_import_path(text)
        elif not self._free_types:
            accepted = text in self.choices
        else:
            accepted = self.rule.form is None or self.rule.form(text)
        if not accepted:
            hint = did_you_mean(text, self.rule.named or self.choices)
            raise UserError(f"{self.name} is {shortened(repr(text))}; it must be {self.expected}{hint}")

    @property
    def _free_types(self) -> list[type]:
        return [kind for kind in (int, float, str) if kind in (self.type, *get_args(self.type))]


def did_you_mean(text: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Returns "; did you mean X?" for the nearest of some names, or "" if none is as similar as cutoff."""
    nearest = get_close_matches(text, [name for name in known if name], n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]}?" if nearest else ""


@functools.cache
def settings() -> MappingProxyType[str, Setting]:
    """Returns every setting of Config by its dotted name."""
    return MappingProxyType({found.name: found for found in _walk(Config, "", False, _field_docstrings())})


def _walk(cls: type, prefix: str, inherited: bool, docs: dict[tuple[str, str], str]) -> Iterator[Setting]:
    """Yields the settings of a class and its sections.

    inherited: changes_experiment of the section. docs: `_field_docstrings`.
    """
    for f in fields(cls):
        if is_dataclass(f.type):
            changes_experiment = inherited or f.metadata["changes_experiment"]
            yield from _walk(f.type, f"{prefix}{f.name}.", changes_experiment, docs)
        else:
            rule = f.metadata.get("rule", Rule())
            rule = replace(rule, changes_experiment=inherited or rule.changes_experiment)
            default = f.default if f.default_factory is MISSING else f.default_factory()
            yield Setting(prefix + f.name, f.type, default, docs[cls.__name__, f.name], rule)


def in_mapping(name: str) -> bool:
    """Returns whether a dotted name is one in a mapping, such as megatron.ddp.bucket_size."""
    mapping = settings().get(name.rpartition(".")[0])
    return mapping is not None and mapping.is_mapping


def setting_of(name: str) -> Setting:
    """Returns the setting of a dotted name; a name inside a mapping belongs to the mapping's setting."""
    return settings()[name.rpartition(".")[0] if in_mapping(name) else name]


def _field_docstrings() -> dict[tuple[str, str], str]:
    """Returns the string below each field of this module by (class, field)."""
    # one pass over the source: docstring_parser parses the whole module again for each class, 0.9 s in all
    module = ast.parse(inspect.getsource(sys.modules[__name__]))
    return {
        (cls.name, statement.target.id): following.value.value
        for cls in module.body
        if isinstance(cls, ast.ClassDef)
        for statement, following in pairwise(cls.body)
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr)
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of dataclasses.asdict(config) by the settings' dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check(config: Config, world_size: int) -> None:
    """Raises UserError, one line with setting, value and remedy, for the first setting that cannot be used.

    config: resolved by presets.resolve. world_size: number of processes. Needs no file and no package: see
    startup.validate for the rest.
    """
    check_values(config)
    check_processes(config.parallel, world_size)
    _check_batches(config)
    _check_tokens(config)
    _check_loss(config)
    _check_staleness(config)
    if config.rollout.colocate and config.weight_sync.method == "distributed":
        raise UserError(
            "weight_sync.method is 'distributed' and rollout.colocate is true; a broadcast has one process "
            "on a GPU, and there the policy and a server share it: set weight_sync.method=tensor"
        )
    if config.weight_sync.delta and config.model.dtype != "bfloat16":
        raise UserError(
            "weight_sync.delta is true and model.dtype is 'float32', whose weights change in nearly every "
            "element at every step; set weight_sync.delta=false"
        )
    if config.model.routing_replay == "engine" and config.rollout.engine == "local":
        raise UserError(
            "model.routing_replay is engine and rollout.engine is local, which does not return its routing; "
            "set rollout.engine=sglang, or model.routing_replay=old"
        )


def _check_staleness(config: Config) -> None:
    stale, rollout = f"rollout.max_staleness is {config.rollout.max_staleness}", config.rollout
    if not rollout.max_staleness:
        return
    if rollout.engine == "local":
        raise UserError(
            f"{stale} and rollout.engine is local, which generates in the training processes; set "
            "rollout.engine=sglang, or rollout.max_staleness=0"
        )
    if rollout.colocate:
        raise UserError(
            f"{stale} and rollout.colocate is true; servers on the policy's GPUs cannot generate while it "
            "trains: set rollout.max_staleness=0, or name other GPUs in rollout.sglang.gpus"
        )
    if config.model.routing_replay == "engine":
        raise UserError(
            f"{stale} and model.routing_replay is engine; servers do not return the experts of a "
            "response that spans a weight sync: set model.routing_replay=old"
        )


def check_values(config: Config) -> None:
    """Raises UserError for the first setting whose value its own field does not accept.

    The names in a mapping are not known here.
    """
    for name, value in flatten(asdict(config)).items():
        if name in settings():
            settings()[name].check(value)


def check_processes(layout: ParallelConfig, world_size: int) -> None:
    """Raises UserError for a layout that the given number of processes cannot have."""
    if layout.sequence and layout.tensor == 1:
        raise UserError("parallel.sequence is true; it needs parallel.tensor of at least 2, which is 1")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise UserError(
            f"parallel.virtual_pipeline is {layout.virtual_pipeline}; "
            "it needs parallel.pipeline of at least 2, which is 1"
        )
    # experts are spread over tensor-, context- and data-parallel ranks alike
    for names in (("tensor", "context", "pipeline"), ("expert", "pipeline")):
        sizes = {name: getattr(layout, name) for name in names}
        product = math.prod(sizes.values())
        if world_size % product:
            *most, last = (f"parallel.{name} is {size}" for name, size in sizes.items())
            raise UserError(
                f"{', '.join(most)} and {last}; their product {product} must divide the number of "
                f"processes, {world_size}"
            )


def _check_batches(config: Config) -> None:
    prompts, updates = config.rollout.prompts_per_step, config.train.updates_per_step
    if prompts % updates:
        raise UserError(
            f"train.updates_per_step is {updates}; it must divide rollout.prompts_per_step = {prompts}"
        )
    most = config.rollout.max_prompts_per_step
    if config.rollout.dynamic_sampling and most < prompts:
        raise UserError(
            f"rollout.max_prompts_per_step is {most}; "
            f"it must be at least rollout.prompts_per_step = {prompts}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(
            f"optimizer.min_lr is {config.optimizer.min_lr}; "
            f"it must not exceed optimizer.lr = {config.optimizer.lr}"
        )


def _check_tokens(config: Config) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    sequence = config.train.max_sequence_tokens
    if sequence < prompt + response:
        raise UserError(
            f"train.max_sequence_tokens is {sequence}; it must be at least data.max_prompt_tokens + "
            f"rollout.max_new_tokens = {prompt} + {response} = {prompt + response}"
        )


def _check_loss(config: Config) -> None:
    loss = config.loss
    _check_correction(loss)
    if loss.baseline != "mean" and config.rcc.enabled:
        raise UserError(
            f"loss.baseline is {loss.baseline!r} and rcc.enabled is true; RCC corrects the mean: set "
            "rcc.enabled=false or loss.baseline=mean"
        )
    if loss.kl_coefficient and (loss.kl_in, loss.kl_estimator) == ("loss", "k1"):
        raise UserError(
            "loss.kl_estimator is k1 with loss.kl_in=loss; its expected gradient is 0, whatever the "
            "reference: use k2, or loss.kl_in=reward"
        )
    if loss.objective != "geometric" and loss.clip_low > 1:
        raise UserError(
            f"loss.clip_low is {loss.clip_low}; it must be within 0 and 1: ratios are clipped at "
            "1 - clip_low and are never negative"
        )


def _check_correction(loss: LossConfig) -> None:
    low, high = loss.correction_low, loss.correction_high
    if loss.correction == "none":
        for name, bound in (("correction_low", low), ("correction_high", high)):
            if bound is not None:
                raise UserError(
                    f"loss.{name} is {bound} and loss.correction is none, which has no bounds; choose a "
                    f"correction, or set loss.{name}=null"
                )
    elif low > high:
        raise UserError(f"loss.correction_low is {low}; it must not exceed loss.correction_high = {high}")
