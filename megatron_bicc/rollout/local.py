"""The engine in the training processes: transformers' `generate` on a Hugging Face copy of the policy."""

import logging
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.data.encoding import end_token_ids
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import supported_config
from megatron_bicc.model.policy import is_finite
from megatron_bicc.rollout.types import Engine, Request, Sample, Sampling
from megatron_bicc.weights.hf_files import load_transformers, mismatch

LARGE = 100_000_000
"""Parameters of a policy above which the local engine warns on a GPU: it is for small policies and tests"""
FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters in which transformers fuses a layer's experts, [experts, out, in], and their parts in order"""


logger = logging.getLogger(__name__)


class LocalEngine(Engine):
    """Generates in the training processes, each with a whole copy of the model."""

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        """Reads the Hugging Face directory `path`.

        Raises UserError if its weights cannot be read, or are not finite.
        """
        self.model = load_transformers(path, dtype).to(device)
        bad = [name for name, parameter in self.model.named_parameters() if not is_finite(parameter.detach())]
        if bad:
            raise UserError(
                f"model.path is {path}; {bad[0]}: contains NaN or infinite values; take an intact copy"
            )
        self.ends = end_token_ids(self.model.config, tokenizer, path)
        # a model's own generation config may warp the distribution (top_k, repetition penalty)
        self.model.generation_config = GenerationConfig()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.version = 0

    @torch.inference_mode()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Returns one sample per request, in the requests' order. Batches have similar prompt lengths."""
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].token_ids), i))
        samples: dict[int, Sample] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            samples |= zip(batch, self._generate([requests[i] for i in batch], sampling), strict=True)
        return [samples[i] for i in range(len(requests))]

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies every tensor, given under its Hugging Face name, into the model.

        Raises UserError for a missing or an unknown name.
        """
        missing = weights_by_file_name(self.model)
        for name, tensor in tensors:
            if name not in missing:
                raise UserError(f"weight sync: the rollout engine's model has no parameter {name}")
            missing.pop(name).copy_(tensor)
        if missing:
            raise UserError(f"weight sync: missing tensors: {', '.join(sorted(missing))}")
        self.version = version

    def _generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        input_ids, mask = _left_padded([r.token_ids for r in requests], self.tokenizer.pad_token_id)
        sampler = SeededSampler([r.seed for r in requests], sampling.temperature, self.model.device)
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = output[:, input_ids.shape[1] :].cpu().numpy().astype(np.int32)
        log_probs = torch.stack(sampler.log_probs, dim=1).cpu().numpy()
        return [self._sample(*row) for row in zip(tokens, log_probs, strict=True)]

    def _sample(self, tokens: np.ndarray, log_probs: np.ndarray) -> Sample:
        ends = np.flatnonzero(np.isin(tokens, self.ends))
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        reason = "stop" if len(ends) else "length"
        return Sample(tokens[:length].copy(), log_probs[:length].copy(), reason, self.version)


def make_local_engine(config: Config, tokenizer: PreTrainedTokenizerBase) -> LocalEngine:
    """Returns the engine with the weights of model.path.

    Raises UserError if they cannot be read, are not finite, or if transformers' model has other parameters
    than the directory, so that it could not load the policy's weights.
    """
    path, dtype = config.model.path, getattr(torch, config.model.dtype)
    engine = LocalEngine(path, tokenizer, dtype, device.device(), config.rollout.batch_size)
    check_names(engine.model, supported_config(path))
    size = engine.model.num_parameters()
    if device.has_cuda() and device.is_first() and size > LARGE:
        logger.warning(
            "rollout.engine is local, and the policy has %.1f billion parameters: transformers generates "
            "many times slower than a server; set rollout.engine=sglang",
            size / 1e9,
        )
    return engine


def weights_by_file_name(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns views of the model's weights under their names in a Hugging Face directory."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        experts, _, kind = name.rpartition(".")
        if not experts.endswith(".experts") or kind not in FUSED_EXPERTS:
            found[name] = parameter
            continue
        parts = FUSED_EXPERTS[kind]
        for e, expert in enumerate(parameter.detach()):
            names = (f"{experts}.{e}.{part}.weight" for part in parts)
            found |= zip(names, expert.chunk(len(parts)), strict=True)
    return found


def check_names(model: PreTrainedModel, hf_config: PretrainedConfig) -> None:
    """Raises UserError if transformers' model has other tensors than a directory of that configuration.

    The policy's weights have the directory's names: a tensor of another name would never be updated.
    """
    if problem := mismatch(hf_config, weights_by_file_name(model)):
        raise UserError(
            f"rollout.engine=local could not take the policy's weights: in transformers' model {problem}; "
            "choose rollout.engine=sglang"
        )


class SeededSampler(LogitsProcessor):
    """Samples within generate's greedy search, each row from its own random stream.

    argmax(p / noise) with exponential noise is a draw from p (the Gumbel-max trick), so greedy search picks a
    sample, which depends on the row's seed alone, not on the other rows of the batch. A CPU and a GPU draw
    different numbers.
    """

    def __init__(self, seeds: list[int], temperature: float, device: torch.device) -> None:
        """device: of the scores. The noise is drawn there: V numbers a row and token."""
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Maps scores [rows, V] to scores that are 0 at the sampled token and -inf elsewhere."""
        log_p = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        noise = torch.empty_like(log_p)
        for row, stream in zip(noise, self.streams, strict=True):
            row.exponential_(generator=stream)
        chosen = (log_p - noise.log()).argmax(-1, keepdim=True)
        self.log_probs.append(log_p.gather(-1, chosen).squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)


def _left_padded(rows: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Returns (token ids int64, attention mask int64), both [rows, longest]."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
