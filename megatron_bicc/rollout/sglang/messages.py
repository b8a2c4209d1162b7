"""What an SGLang server is asked for a group of samples, and what its answer says."""

from typing import Any

import numpy as np

from megatron_bicc.rollout.types import Request, Sample, Sampling


class StaleWeights(Exception):
    """A server sampled with other weights than asked for. One line: which."""


class BadAnswer(Exception):
    """A server's answer is not what was asked for. One line: what is wrong with it."""


def generate_body(requests: list[Request], sampling: Sampling, eos: int) -> dict[str, Any]:
    """The JSON of POST /generate for requests of one prompt.

    The whole distribution is sampled: what a server or a model's generation_config would cut off by default
    is switched off by name, as log-probs are not renormalised for it.
    """
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": [eos],
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": False,
    }
    return {
        "input_ids": [request.token_ids.tolist() for request in requests],
        "sampling_params": [settings | {"sampling_seed": request.seed} for request in requests],
        "return_logprob": True,
        "logprob_start_len": -1,
    }


def read_samples(answer: Any, count: int, version: str, vocab_size: int) -> list[Sample]:
    """The samples in an answer to `generate_body` of `count` requests.

    Raises StaleWeights if a sample is not of weight version `version` from its first token to its last, and
    BadAnswer if the answer is not whole, or a token is no token of the policy.
    """
    if not isinstance(answer, list) or len(answer) != count:
        raise BadAnswer(f"{count} samples were asked for, and the answer is {str(answer)[:100]}")
    try:
        return [_sample(item["output_ids"], item["meta_info"], version, vocab_size) for item in answer]
    except (KeyError, TypeError, IndexError) as error:
        raise BadAnswer(f"an answer without {error}") from None


def _sample(output_ids: list[int], meta: dict[str, Any], version: str, vocab_size: int) -> Sample:
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise BadAnswer(f"a sample ended by {meta['finish_reason']}")
    versions = {str(span["version"]) for span in meta.get("weight_versions") or ()}
    versions.add(str(meta["weight_version"]))
    if versions != {version}:
        raise StaleWeights(f"a sample of weight version {', '.join(sorted(versions))}, not {version}")
    tokens = np.array(output_ids, dtype=np.int64)
    log_probs = np.array([entry[0] for entry in meta["output_token_logprobs"]], dtype=np.float32)
    named = [entry[1] for entry in meta["output_token_logprobs"]]
    if not len(tokens) or named != output_ids or not np.isfinite(log_probs).all():
        raise BadAnswer("the log-probs are not those of the tokens")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise BadAnswer(f"token {tokens.max()} was sampled, but the policy has {vocab_size} tokens")
    number = int(version) if version.isdigit() else 0
    return Sample(tokens.astype(np.int32), log_probs, reason, number)
