"""Run by torchrun: optimizer steps under every layout of its number of processes.

torchrun --nproc-per-node 2 step_worker.py INPUTS OUT

INPUTS holds, for each of MODELS, the directories MODEL (the reference policy) and MODEL_moved (the policy in
training) and the file MODEL.pt (the groups); for each of EDGES a file of groups; INPUTS/saved/one is a run's
directory, with a checkpoint of one process after a step of the model with experts. Rank 0 writes {layout:
result of run_steps} and {edge: its step} to OUT.
"""

import hashlib
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.model_parallel import leave_model_parallel
from support.models import make_model
from support.routing import drawn, with_experts
from support.steps import CASES, ENTROPY, KL, TOKENIZER, hf_gradients, make_config, to_groups

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import (
    CheckpointWriter,
    Progress,
    checkpoints,
    load_checkpoint,
    read_progress,
)
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config, ParallelConfig, check_processes
from megatron_bicc.errors import NotFiniteError, UserError
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.families import check_layout
from megatron_bicc.model.policy import Policy, start_model_parallel
from megatron_bicc.training.learner import Learner
from megatron_bicc.training.step_metrics import update_metrics
from megatron_bicc.weights.hf_files import SafetensorsDirectory
from megatron_bicc.weights.hf_mapping import rule_for
from megatron_bicc.weights.hf_weights import HfWeights, hf_tensors, load_policy

TP2, SP2 = {"parallel.tensor": 2}, {"parallel.tensor": 2, "parallel.sequence": True}
PP2, VPP2 = {"parallel.pipeline": 2}, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}
CP2, CP4 = {"parallel.context": 2}, {"parallel.context": 4}
DENSE = {
    1: {"one": {}},
    2: {"dp2": {}, "tp2": TP2, "tp2_sp": SP2, "pp2": PP2, "vpp2": VPP2, "cp2": CP2},
    4: {
        "dp4": {},
        "tp2_dp2": TP2,
        "tp2_sp_dp2": SP2,
        "pp2_dp2": PP2,
        "vpp2_dp2": VPP2,
        "tp2_pp2": TP2 | PP2,
        "tp2_sp_pp2": SP2 | PP2,
        "tp2_vpp2": TP2 | VPP2,
        "tp2_sp_vpp2": SP2 | VPP2,
        "cp4": CP4,
        "cp2_dp2": CP2,
        "tp2_sp_cp2": SP2 | CP2,
        "pp2_cp2": PP2 | CP2,
        "vpp2_cp2": VPP2 | CP2,
    },
    8: {"cp4_dp2": CP4, "tp2_sp_cp4": SP2 | CP4, "pp2_cp4": PP2 | CP4, "vpp2_cp4": VPP2 | CP4},
}
MODELS = {"dense": "qwen3_tied", "windows": "gemma3", "moe": "qwen3_moe", "replay": "qwen3_moe"}
SECTIONS = ("tensor", "sequence", "pipeline", "virtual_pipeline", "expert", "context")
WITH_CONTEXT = {
    1: (),
    2: ("ep2_cp2",),
    4: ("ep4_cp2", "tp2_sp_ep2_cp2", "pp2_ep2_cp2", "ep2_cp4"),
    8: ("tp2_sp_ep2_cp4",),
}
"""Layouts with experts and context parallel, by the number of processes"""
RESHARDED = ("tp2_sp", "ep2", "tp2_sp_pp2_ep2", "ep2_cp2")
"""Layouts with experts between which and one process a checkpoint is handed"""
RECOMPUTE = ("none", "selective", "full")
FULL, MOE = {"model.recompute": "full"}, {"megatron.transformer": {"recompute_modules": ["moe"]}}
REPLAYED = {
    1: {},
    2: {"tp2_sp": FULL, "ep2_cp2": {}, "pp2": {"model.recompute": "selective"} | MOE, "pp2_vpp2": FULL},
    4: {"moe": {}, "tp2_sp_ep2_cp2": FULL, "tp2_sp_pp2_vpp2_ep2": FULL},
    8: {},
}
"""Layouts with experts that are taken with routing replay, too, and what they recompute"""
WINDOWS = {"tp2_sp": "none", "pp2": "full", "tp2_sp_vpp2": "selective"}
"""Layouts of the model with sliding windows, and the recompute of each"""
CASE = CASES["bicc_rcc_mixed_conditioned"]
"""Both packings, the reference policy, and a pass for the conditioned denominator"""
EDGES = ("long_response", "long_prefix", "few_rows", "one_token")
"""Steps on four context-parallel ranks that hold EDGE_ROWS rows each"""
EDGE_ROWS = 24
EDGE_CASE = ("gspo+bicc", KL | ENTROPY | {"bicc__weight": 0.5, "loss__correction": "sequence_tis"})


def layouts(processes: int) -> dict[str, tuple[str, dict]]:
    """Name: (model, settings by dotted name), such that those of equal process groups are neighbours.

    Up to two processes the dense model has every layout with every kind of recompute; else they take turns.
    """
    found = {}
    for i, (name, settings) in enumerate(DENSE[processes].items()):
        for recompute in RECOMPUTE if processes <= 2 else (RECOMPUTE[i % 3],):
            found[f"{name}-{recompute}"] = ("dense", settings | {"model.recompute": recompute})
        if name in WINDOWS:
            found[f"windows_{name}"] = ("windows", settings | {"model.recompute": WINDOWS[name]})
    for i, (name, settings) in enumerate(expert_layouts(processes).items()):
        found[name] = ("moe", settings | {"model.recompute": RECOMPUTE[i % 3]})
        if name in REPLAYED[processes]:
            found[f"{name}-replay"] = ("replay", settings | REPLAYED[processes][name])
    return found


def expert_layouts(processes: int) -> dict[str, dict]:
    """Every layout of the model with experts that a run's start-up accepts, by name; of those with context
    parallel, and of those of eight processes, WITH_CONTEXT."""
    hf_config = make_model(MODELS["moe"], layers=4).config
    hf_config.architectures = ["Qwen3MoeForCausalLM"]  # as in its directory's config.json
    found = {}
    for sizes in product((1, 2, 4), (False, True), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4)):
        parallel = ParallelConfig(**dict(zip(SECTIONS, sizes, strict=True)))
        try:
            check_processes(parallel, processes)
            check_layout(hf_config, parallel)
        except UserError:
            continue
        settings = {f"parallel.{section}": size for section, size in zip(SECTIONS, sizes, strict=True)}
        tensor, _, pipeline, chunks, expert, context = sizes
        parts = {"tp{}_sp": tensor, "pp{}": pipeline, "vpp{}": chunks, "ep{}": expert, "cp{}": context}
        name = "_".join(part.format(size) for part, size in parts.items() if size > 1)
        if (parallel.context == 1 and processes < 8) or name in WITH_CONTEXT[processes]:
            found[name or "moe"] = settings
    return found


def configure(path: Path, settings: dict, case: tuple[str, dict] = CASE, rows: int | None = None) -> Config:
    """The case's configuration under a layout, with micro-batches of so many rows.

    rows: None for few, so that there are several micro-batches, or two.
    """
    algorithm, choices = case
    config = make_config(path, algorithm, **choices)
    # a large eps: else Adam's first update is the sign of the gradient, and rounding flips that of a tiny one
    config.optimizer.lr, config.optimizer.eps, config.optimizer.clip_grad = 1e-2, 1e-2, 1.0
    for name, value in settings.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    rows = rows or (100 if path.name == "dense" else 200)
    config.model.routing_replay = "engine" if path.name == "replay" else "none"
    config.train.max_tokens_per_microbatch = rows // config.parallel.context
    return config


class Training:
    """A policy in training, of one of the models under a layout."""

    def __init__(self, inputs: Path, model: str, settings: dict, edge: str | None = None) -> None:
        """edge: of EDGES; None: the usual groups."""
        if edge is None:
            config = configure(inputs / model, settings)
        else:
            config = configure(inputs / model, settings, EDGE_CASE, 4 * EDGE_ROWS)
        self.policy = load_policy(config)
        self.learner = Learner(config, self.policy, TOKENIZER)
        moved = SafetensorsDirectory(inputs / f"{model}_moved")
        HfWeights(self.policy.hf_config, moved).load(self.policy.modules)
        self.policy.optimizer.reload_model_params()
        examples = torch.load(inputs / f"{edge or model}.pt", weights_only=False)
        self.groups = to_groups(examples)
        if model == "replay":
            self.groups = with_experts(self.groups, examples, drawn(examples, self.policy.hf_config))

    def step(self) -> dict:
        """Metrics, log-probs, gradients, updated weights, which of their copies differ between processes, and
        of each rank's micro-batches the response rows and the chunks of the context ranks. Collective."""
        result = self.learner.step(self.groups, Stopwatch())[-1]
        found = {
            "metrics": update_metrics(result, self.learner.config, 0),
            "log_probs": [torch.from_numpy(x) for x in vars(result.log_probs).values() if x is not None],
            "weights": self.weights(),
            "unequal": unequal_copies(self.policy),
            "response_rows": [
                [batch.num_response_rows for batch in rank] for t in result.trained for rank in t.plan.ranks
            ],
            "chunks": [
                [each.length_W.tolist() for each in batch.chunks]
                for trained in result.trained
                for rank in trained.plan.ranks
                for batch in rank
            ],
        }
        updated = self.policy.host_copy()
        found["gradients"] = hf_gradients(self.policy)
        self.policy.set_weights(updated)
        return found

    def replay_old(self) -> None:
        """From now on a step takes two updates: the second replays the experts of the policy before both."""
        config = self.learner.config
        config.model.routing_replay, config.train.updates_per_step = "old", 2
        config.bicc.denominator = "plain"  # its micro-batches are not those that have recorded
        self.groups = self.groups * 2

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, whole, by their Hugging Face names. Collective."""
        weights = hf_tensors(self.policy.modules, self.policy.hf_config)
        return {name: tensor.clone() for name, tensor in weights}

    def save(self, run: Path) -> None:
        """A checkpoint of the policy in the run's directory. Collective."""
        writer = CheckpointWriter(str(run), keep=1)
        writer.snapshot(self.policy, Progress(1, {}, self.policy.scheduler.state_dict(), {}, {}))
        writer.start()
        writer.wait()

    def load(self, run: Path) -> None:
        """The checkpoint that `save` left. Collective."""
        (checkpoint,) = checkpoints(str(run))
        load_checkpoint(checkpoint, self.policy, read_progress(checkpoint))


def unequal_copies(policy: Policy) -> list[str]:
    """Weights of which two processes hold copies that are not equal to the bit. Collective."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    experts = getattr(policy.hf_config, "num_experts", 0)
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    first_expert = expert_rank * (experts // parallel_state.get_expert_model_parallel_world_size())
    own = {}
    for module in policy.modules:
        first_layer = module.decoder.layers[0].layer_number - 1
        for name, parameter in module.named_parameters():
            tied = name == "output_layer.weight" and module.share_embeddings_and_output_weights
            weight = "embedding.word_embeddings.weight" if tied else name
            rule = rule_for(weight, first_layer, module.output_norms)
            is_cut = rule.expert is None and rule.kind != "replicated"
            place = (rule.hf_names(first_expert), tensor_rank if is_cut else None)
            own[place] = hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
    copies = defaultdict(set)
    for weights in gathered(own):
        for place, digest in weights.items():
            copies[place].add(digest)
    return sorted(names[0] for (names, _), digests in copies.items() if len(digests) > 1)


def run_steps(inputs: Path, name: str, model: str, settings: dict) -> list[dict]:
    """The layout's first step; with experts the second, too, with routing replay of the other kind; of
    RESHARDED another second one, after a checkpoint of one process. These leave a checkpoint of their own
    after the first step."""
    training = Training(inputs, model, settings)
    steps = [training.step()]
    if model == "replay":
        training.replay_old()
        steps.append(training.step())
    if model == "moe":
        if name in ("one", *RESHARDED):
            training.save(inputs / "saved" / name)
        steps.append(training.step())
    if name in RESHARDED:
        training = Training(inputs, model, settings)
        training.load(inputs / "saved/one")
        loaded = training.weights()
        steps.append(training.step() | {"loaded": loaded})
    steps[0]["refusals"] = gathered(refusal(training.policy))
    return steps


def refusal(policy: Policy) -> str:
    """What the policy says to an update where the last rank's gradients of norms, which tensor-parallel ranks
    hold twice, are NaN; nothing if its weights change all the same. Collective."""
    if dist.get_rank() == dist.get_world_size() - 1:
        for parameter in (p for module in policy.modules for p in module.parameters() if p.dim() == 1):
            parameter.main_grad.fill_(torch.nan)
    before = policy.host_copy()
    try:
        policy.update()
    except NotFiniteError as error:
        return str(error) if all(map(torch.equal, policy.host_copy(), before)) else ""
    return ""


def main(inputs: Path, out: str) -> None:
    """Every layout, one after another; process groups are made again where they differ."""
    device.start_distributed()
    found, groups_of = {}, None
    for name, (model, settings) in layouts(dist.get_world_size()).items():
        parallel = configure(inputs / model, settings).parallel
        if parallel != groups_of:
            leave_model_parallel()
            start_model_parallel(configure(inputs / model, settings))
            groups_of = parallel
        found[name] = run_steps(inputs, name, model, settings)
        if settings.get("parallel.context") == dist.get_world_size() == len(EDGES) and model == "dense":
            found |= {edge: [Training(inputs, model, settings, edge).step()] for edge in EDGES}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
