"""Makes the rollout engine: a built-in by name, or a user's by import path."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from megatron_bicc import plugins
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.local import make_local_engine
from megatron_bicc.rollout.sglang_engine import make_sglang_engine
from megatron_bicc.rollout.types import Engine, StreamingEngine

MakeEngine = Callable[[Config, PreTrainedTokenizerBase], Engine]
ENGINES: dict[str, MakeEngine] = {
    "local": make_local_engine,
    "sglang": make_sglang_engine,
}
"""The built-in engines by the name that rollout.engine takes"""
METHODS = ("generate", "memory_released", "counts", "close")


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Returns the engine that rollout.engine names, with the weights of model.path. Collective.

    Raises UserError, one line, for an unknown name, a class that is not a rollout.types.Engine, or not a
    StreamingEngine with rollout.max_staleness, a rollout server that does not start or serves another model,
    or a model that the engine cannot run.
    """
    name = config.rollout.engine
    if not plugins.is_import_path(name):
        if name not in ENGINES:
            raise UserError(
                f"rollout.engine is {name!r}; choose {', '.join(ENGINES)}, or name a class: "
                "package.module:Class or file.py:Class"
            )
        return ENGINES[name](config, tokenizer)
    engine = plugins.load("rollout.engine", name)(config, tokenizer)
    missing = [method for method in METHODS if not callable(getattr(engine, method, None))]
    if missing:
        raise UserError(
            f"rollout.engine is {name!r}; it has no method {', '.join(missing)}: subclass "
            "megatron_bicc.rollout.types.Engine, which has all but generate"
        )
    if config.rollout.max_staleness and not isinstance(engine, StreamingEngine):
        raise UserError(
            f"rollout.max_staleness is {config.rollout.max_staleness} and rollout.engine is {name!r}, which "
            "has no method stream; to generate during training, an engine must be a "
            "megatron_bicc.rollout.types.StreamingEngine"
        )
    return engine
