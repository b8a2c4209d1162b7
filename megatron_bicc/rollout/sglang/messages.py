"""What an SGLang server is asked for a group of samples, and what its answer says."""

from typing import Any

import numpy as np

from megatron_bicc.rollout.types import Request, Sample, Sampling

LEAST_LOG_PROB = float(np.finfo(np.float32).min)
LOG_PROB_ROUNDING = 1e-3
"""By which the log of a probability of 1 may come out above 0."""


class StaleWeights(Exception):
    """A server sampled with other weights than asked for. One line: which."""


class BadAnswer(Exception):
    """A server's answer is not what was asked for. One line: what is wrong with it."""


def generate_body(requests: list[Request], sampling: Sampling, ends: tuple[int, ...]) -> dict[str, Any]:
    """The JSON of POST /generate for requests of one prompt. ends: ids of the tokens that end a response.

    The whole distribution is sampled: what a server or a model's generation_config would cut off by default
    is switched off by name, as log-probs are not renormalised for it.
    """
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(ends),
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


def read_samples(
    answer: Any, count: int, version: str, vocab_size: int, ends: tuple[int, ...]
) -> list[Sample]:
    """The samples in an answer to `generate_body` of `count` requests.

    Raises StaleWeights if a sample is not of weight version `version` from its first token to its last, and
    BadAnswer if the answer is not whole, a token is no token of the policy, or a sample stopped at a token
    that is none of `ends`.
    """
    if not isinstance(answer, list) or len(answer) != count:
        raise BadAnswer(f"{count} samples were asked for, and the answer is {str(answer)[:100]}")
    try:
        return [_sample(item["output_ids"], item["meta_info"], version, vocab_size, ends) for item in answer]
    except (KeyError, IndexError) as error:
        raise BadAnswer(f"an answer without {error}") from None
    except (TypeError, AttributeError) as error:
        raise BadAnswer(f"an answer of another shape: {error}") from None


def _sample(
    output_ids: Any, meta: dict[str, Any], version: str, vocab_size: int, ends: tuple[int, ...]
) -> Sample:
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise BadAnswer(f"a sample ended by {meta['finish_reason']}")
    versions = {str(span["version"]) for span in meta.get("weight_versions") or ()}
    versions.add(str(meta["weight_version"]))
    if versions != {version}:
        raise StaleWeights(f"a sample of weight version {', '.join(sorted(versions))}, not {version}")
    _check_tokens(output_ids, vocab_size)
    ended = output_ids[-1] in ends
    if reason == "stop" and not ended:
        raise BadAnswer(
            f"a sample stopped at token {output_ids[-1]}, which ends no response of model.path: the server's "
            "model has another generation_config.json or tokenizer"
        )
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    if [entry[1] for entry in meta["output_token_logprobs"]] != output_ids:
        raise BadAnswer("the log-probs are not those of the tokens")
    _check_log_probs(log_probs)
    number = int(version) if version.isdigit() else 0
    # by the last token, as the local engine has it: an end may be the last token that is allowed
    reason = "stop" if ended else "length"
    return Sample(np.array(output_ids, np.int32), np.array(log_probs, np.float32), reason, number)


def _check_tokens(output_ids: Any, vocab_size: int) -> None:
    if not isinstance(output_ids, list) or not output_ids:
        raise BadAnswer(f"a sample whose tokens are {str(output_ids)[:100]}")
    for token in output_ids:
        if type(token) is not int:  # JSON's true is an int to isinstance
            raise BadAnswer(f"a sample with {str(token)[:100]} for a token")
        if not 0 <= token < vocab_size:
            raise BadAnswer(f"token {str(token)[:100]} was sampled, but the policy has {vocab_size} tokens")


def _check_log_probs(log_probs: list[Any]) -> None:
    for value in log_probs:
        # written so that a NaN fails
        if type(value) not in (int, float) or not LEAST_LOG_PROB <= value <= LOG_PROB_ROUNDING:
            raise BadAnswer(f"a sample with {str(value)[:100]} for a log-prob")
