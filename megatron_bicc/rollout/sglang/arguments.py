"""Whether a server can be started with the arguments of rollout.sglang.server_args."""

import shlex
from itertools import zip_longest

SET_BY_THE_RUN = "the run sets it from its other settings"
TOLD_BY_THE_SERVER = (
    "a server writes it into its log: start the servers yourself and use rollout.launch=attach"
)
REFUSED = {
    **dict.fromkeys(("--model-path", "--model", "--host", "--port", "--dtype"), SET_BY_THE_RUN),
    **dict.fromkeys(("--random-seed", "--config", "--weight-version"), SET_BY_THE_RUN),
    **dict.fromkeys(("--api-key", "--admin-api-key", "--ssl-keyfile-password"), TOLD_BY_THE_SERVER),
    "--preferred-sampling-params": "the policy gradient needs samples of the whole distribution, so top_p, "
    "top_k, min_p and penalties stay off",
}
LOAD_FORMAT, CONTEXT_LENGTH = "--load-format", "--context-length"


def check_arguments(text: str) -> None:
    """Raises ValueError, one line, for text that no shell reads or an argument that does not fit."""
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"rollout.sglang.server_args is {text!r}: {error}") from None
    for argument, following in zip_longest(arguments, arguments[1:]):
        given, equals, value = argument.partition("=")
        for name, reason in REFUSED.items():
            if _means(given, name):
                raise ValueError(f"rollout.sglang.server_args has {_told(given, name)}; {reason}")
        if _means(given, LOAD_FORMAT) and (value if equals else following) == "dummy":
            raise ValueError(
                f"rollout.sglang.server_args has {_told(given, LOAD_FORMAT)} dummy; the server would begin "
                "with random weights, not those of model.path"
            )


def context_length(text: str) -> int | None:
    """The value of --context-length in arguments that `check_arguments` accepts; None without one."""
    arguments = shlex.split(text)
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        given, equals, value = argument.partition("=")
        value = value if equals else following
        if _means(given, CONTEXT_LENGTH) and value.isdecimal():
            return int(value)
    return None


def _means(given: str, name: str) -> bool:
    """Whether SGLang's parser takes it for that name: argparse takes the beginning of one, too."""
    return len(given) > len("--") and name.startswith(given)


def _told(given: str, name: str) -> str:
    return name if given == name else f"{given}, which is short for {name}"
