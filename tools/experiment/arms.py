"""The arms of the experiment. For each seed all use the same prompts and numbers of rollouts and steps."""

from dataclasses import dataclass

STEPS = 24
COMMON = (
    "parallel.tensor=1",
    "rollout.prompts_per_step=16",
    "rollout.group_size=8",
    f"train.steps={STEPS}",
    # contexts of 0.2, 0.4 and 0.6 of it have room for about two, four and all seven opposite rollouts
    "train.max_sequence_tokens=256",
    "evaluation.every=3",
    "evaluation.prompts=75",
    "evaluation.samples=4",
    "checkpoint.every=0",
    "monitoring.tensorboard=false",
    "monitoring.reference=true",
)
CONFIG = "examples/configs/tiny.yaml"


@dataclass(frozen=True)
class Arm:
    """An algorithm with its settings."""

    name: str
    settings: tuple[str, ...]
    """Settings in addition to COMMON"""
    seeds: int
    """Number of seeds, from 1"""
    against: str = "grpo"
    """The arm it is tested against, on their common seeds"""


MAIN = (
    Arm("grpo", ("algorithm=grpo",), 8),
    Arm("grpo+rcc", ("algorithm=grpo+rcc",), 8),
    Arm("bicc", ("algorithm=grpo+bicc",), 8),
    Arm("bicc+rcc", ("algorithm=grpo+bicc+rcc",), 8),
)
VARIANTS = (
    Arm("grpo+rcc, sequence_sum", ("algorithm=grpo+rcc", "rcc.delta=sequence_sum"), 4, "grpo"),
    Arm("bicc, conditioned", ("algorithm=grpo+bicc", "bicc.denominator=conditioned"), 4, "bicc"),
    Arm("bicc+rcc, conditioned", ("algorithm=grpo+bicc+rcc", "bicc.denominator=conditioned"), 4, "bicc+rcc"),
    Arm("bicc+rcc, context 0.2", ("algorithm=grpo+bicc+rcc", "bicc.context_ratio=0.2"), 4, "bicc+rcc"),
    Arm("bicc+rcc, context 0.6", ("algorithm=grpo+bicc+rcc", "bicc.context_ratio=0.6"), 4, "bicc+rcc"),
    Arm("bicc+rcc, weight 0.5", ("algorithm=grpo+bicc+rcc", "bicc.weight=0.5"), 4, "bicc+rcc"),
)
HALFWAY = Arm("grpo, 5 steps", ("algorithm=grpo", "train.steps=5", "evaluation.every=5"), 4)
"""Not compared: tools/experiment/probes.py examines its half-trained policies"""


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed."""

    arm: Arm
    seed: int

    @property
    def folder(self) -> str:
        """Its path in the experiment's directory."""
        return f"{self.arm.name.replace(', ', '_').replace(' ', '_')}/seed_{self.seed}"

    def settings(self) -> tuple[str, ...]:
        """Returns the arguments of megatron_bicc.train, without output_dir."""
        return ("--config", CONFIG, *COMMON, *self.arm.settings, f"seed={self.seed}")


def jobs() -> list[Job]:
    """Returns every run, the main four first, seed by seed: an interrupted experiment is a smaller one."""
    by_arm = [Job(arm, seed) for arm in (*MAIN, HALFWAY, *VARIANTS) for seed in range(1, arm.seeds + 1)]
    late = {arm.name: arm not in MAIN for arm in (*MAIN, HALFWAY, *VARIANTS)}
    return sorted(by_arm, key=lambda job: (job.seed > 4, late[job.arm.name], job.seed))
