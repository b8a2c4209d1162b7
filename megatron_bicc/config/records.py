"""Settings of what a run measures, keeps and shows."""

from dataclasses import dataclass


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
