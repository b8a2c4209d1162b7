"""Tests a rollout engine from a user's file: a run trains on its rollouts and syncs weights to it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.two_steps import assert_engine_followed, train_two_steps

from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.engines import make_engine
from megatron_bicc.weights.sync import make_weight_sync

ENGINE = """
from pathlib import Path

from megatron_bicc.rollout.local import make_local_engine
from megatron_bicc.rollout.types import Engine


class Logged(Engine):
    def __init__(self, config, tokenizer):
        self.local = make_local_engine(config, tokenizer)
        self.log = (Path(config.output_dir).parent / "engine.log").open("a")

    def generate(self, requests, sampling):
        print("generate", len(requests), file=self.log, flush=True)
        return self.local.generate(requests, sampling)

    def load_weights(self, tensors, version):
        self.local.load_weights(tensors, version)
        print("weights", version, file=self.log, flush=True)

    def close(self):
        print("close", file=self.log, flush=True)


class Mute:
    def __init__(self, config, tokenizer):
        pass


class Fixed(Engine):
    def __init__(self, config, tokenizer):
        pass

    def generate(self, requests, sampling):
        return []


class Short(Logged):
    def generate(self, requests, sampling):
        return self.local.generate(requests, sampling)[:-1]


class Other(Logged):
    def generate(self, requests, sampling):
        return [None] * len(requests)


class Partial(Logged):
    def load_weights(self, tensors, version):
        next(tensors)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_engine.py"
    path.write_text(ENGINE)
    return path


def test_a_run_trains_on_its_rollouts(
    file: Path, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    records = train_two_steps(model_dirs["qwen3_tied"], tmp_path, f"rollout.engine={file}:Logged")
    assert_engine_followed(records)
    log = (tmp_path / "engine.log").read_text().splitlines()
    assert log == ["weights 0", "generate 24", "weights 1", "generate 24", "weights 2", "close"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Short", "generate returned 23 samples for 24 requests; it must return one per request"),
        ("Other", "generate returned a NoneType for request 0"),
        ("Partial", r"load_weights left \d+ tensors unread, such as"),
    ],
)
def test_an_engine_that_breaks_the_protocol_is_refused(
    name: str, message: str, file: Path, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_two_steps(model_dirs["qwen3_tied"], tmp_path, f"rollout.engine={file}:{name}")


def named(file: Path | str, name: str) -> Config:
    config = Config()
    config.rollout.engine = f"{file}:{name}"
    return config


def test_an_engine_without_the_methods_is_refused(file: Path) -> None:
    message = "it has no method generate, memory_released, counts, close: subclass"
    with pytest.raises(UserError, match=message):
        make_engine(named(file, "Mute"), None)


def test_an_engine_that_cannot_stream_is_refused_where_training_goes_on(file: Path) -> None:
    config = named(file, "Fixed")
    config.rollout.max_staleness = 1
    with pytest.raises(UserError, match=r"max_staleness is 1 and .*my_engine.py:Fixed', which has no method"):
        make_engine(config, None)


def test_an_engine_that_takes_no_weights_can_only_evaluate(file: Path) -> None:
    config = named(file, "Fixed")
    engine = make_engine(config, None)
    assert engine.counts() == {}
    with engine.memory_released():
        pass
    with pytest.raises(UserError, match=r"my_engine.py:Fixed'; it cannot take new weights: give it a method"):
        make_weight_sync(config, SimpleNamespace(), engine, lambda groups: None)


def test_an_unknown_name_is_refused() -> None:
    config = Config()
    config.rollout.engine = "vllm"
    with pytest.raises(UserError, match="rollout.engine is 'vllm'; choose local, sglang, or name a class"):
        make_engine(config, None)
