"""Every setting of a run: nested dataclasses, read from YAML and `section.name=value` overrides.

A setting of None takes its value from the preset that `algorithm` names
(megatron_bicc.algorithms.presets).
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_bicc.config.algorithm import BiccConfig, LossConfig, RccConfig, RewardConfig
from megatron_bicc.config.policy import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_bicc.config.records import (
    CheckpointConfig,
    EvaluationConfig,
    ExportConfig,
    MonitoringConfig,
    SyntheticConfig,
)
from megatron_bicc.config.rollout import RolloutConfig, SglangConfig, WeightSyncConfig

__all__ = [
    "BiccConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "LossConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RccConfig",
    "RewardConfig",
    "RolloutConfig",
    "SglangConfig",
    "SyntheticConfig",
    "TrainConfig",
    "WeightSyncConfig",
    "flatten",
]


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
