"""Tests damaged and unusual model directories: one line, and the same verdict from every reader."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bicc import evaluate
from megatron_bicc import startup as setup_run
from megatron_bicc.checkpoint.compare_logits import largest_difference
from megatron_bicc.checkpoint.convert import export_hf, import_hf
from megatron_bicc.checkpoint.megatron_files import slots_of
from megatron_bicc.cli import parse_config
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import supported_config
from megatron_bicc.planning.dry_run import dry_run
from megatron_bicc.weights.hf_files import (
    SafetensorsDirectory,
    expected_shapes,
    load_transformers,
)

TINY = Path(__file__).parents[2] / "examples/tiny_policy"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """An edit of model.safetensors."""

    def apply(path: Path) -> None:
        state = load_file(path / "model.safetensors")
        edit(state)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**change: object) -> Callable[[Path], None]:
    """An edit of config.json; None removes an entry."""

    def apply(path: Path) -> None:
        entries = json.loads((path / "config.json").read_text()) | change
        (path / "config.json").write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))

    return apply


def split(path: Path, edit: Callable[[dict], object] = lambda _: None) -> None:
    """Two shards and an index in place of model.safetensors."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    half = len(state) // 2
    shards = {"a.safetensors": list(state)[:half], "b.safetensors": list(state)[half:]}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    edit(index)
    (path / INDEX).write_text(json.dumps(index))


def sharded(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """An edit of the index of two shards."""
    return lambda path: split(path, edit)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def only_pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def no_shard(path: Path) -> None:
    split(path)
    (path / "b.safetensors").unlink()


def in_two_shards(path: Path) -> None:
    split(path)
    held = load_file(path / "b.safetensors") | load_file(path / "a.safetensors")
    save_file(held, path / "b.safetensors", metadata={"format": "pt"})


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    save_file({"lora_A": torch.zeros(2, 2)}, path / "adapter_model.safetensors")


def both_stale(path: Path) -> None:
    """model.safetensors, and an index of shards of zeros."""
    state = load_file(path / "model.safetensors")
    split(path)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    for file in ("a.safetensors", "b.safetensors"):
        zeros = {name: torch.zeros_like(x) for name, x in load_file(path / file).items()}
        save_file(zeros, path / file, metadata={"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "fp8": (config(quantization_config={"quant_method": "fp8"}), "quantized (fp8)"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized (gptq)"),
    "awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantized (awq)"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "quantized (bitsandbytes)",
    ),
    "compressed": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        "quantized (compressed",
    ),
    "window": (
        config(architectures=["LlamaForCausalLM"], model_type="llama", sliding_window=8),
        "sliding_win",
    ),
    "longrope": (
        config(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 4.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 128,
            }
        ),
        "rope_type 'longrope' is not supported",
    ),
    "dynamic": (
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type 'dynamic' is not supported",
    ),
    "mrope": (
        config(rope_parameters=None, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]}),
        "rope_type 'mrope' is not supported",
    ),
    "no architecture": (config(architectures=None), "architecture unknown is not supported"),
    "other architecture": (config(architectures=["GemmaForCausalLM"]), "GemmaForCausalLM is not supported"),
    "other type": (config(model_type="llama"), "they are of different models"),
    "unknown type": (config(model_type="unheard"), "config.json: cannot be used"),
    "no sizes": (config(hidden_size="many"), "config.json: cannot be used"),
    "config cut": (write("config.json", b'{"model_type": '), "config.json: cannot be used"),
    "config empty": (write("config.json", b""), "config.json: cannot be used"),
    "config list": (write("config.json", b"[]"), "config.json: cannot be used"),
    "truncated": (cut, "model.safetensors: cannot be read"),
    "empty": (write("model.safetensors", b""), "model.safetensors: cannot be read"),
    "text": (write("model.safetensors", b"version https://git-lfs" * 9), "model.safetensors: cannot be read"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "there is no model.safetensors"),
    "pickled": (only_pickled, "contains pickled tensors only"),
    "missing": (tensors(lambda x: x.pop(Q)), f"tensor {Q} is missing"),
    "shape": (tensors(lambda x: x.update({Q: x[Q][:-2].clone()})), f"tensor {Q} has shape"),
    "norm shape": (tensors(lambda x: x.update({NORM: torch.ones(7)})), f"tensor {NORM} has shape (7,)"),
    "flat": (tensors(lambda x: x.update({Q: x[Q].flatten()})), f"tensor {Q} has shape"),
    "int8": (tensors(lambda x: x.update({Q: x[Q].to(torch.int8)})), f"tensor {Q} is not of float32"),
    "float8": (
        tensors(lambda x: x.update({Q: x[Q].to(torch.float8_e4m3fn)})),
        f"tensor {Q} is not of float32",
    ),
    "scales": (tensors(lambda x: x.update({Q + "_scale_inv": torch.ones(1)})), "is not part of a"),
    "bias": (tensors(lambda x: x.update({Q[:-6] + "bias": torch.ones(128)})), "is not part of a"),
    "other head": (
        tensors(lambda x: x.update({HEAD: x[EMBEDDING] + 1})),
        f"tensor {HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings=true",
    ),
    "no shard": (no_shard, "b.safetensors: cannot be read"),
    "in two shards": (in_two_shards, f"which {INDEX} does not put there"),
    "unlisted": (sharded(lambda index: index["weight_map"].pop(Q)), f"{Q}, which {INDEX} does not put there"),
    "not there": (
        sharded(lambda index: index["weight_map"].update(extra="a.safetensors")),
        f"does not contain tensor extra, which {INDEX} puts there",
    ),
    "outside": (sharded(lambda index: index["weight_map"].update({Q: "../a"})), "outside of its directory"),
    "no map": (sharded(lambda index: index.pop("weight_map")), f"{INDEX}: not an index of tensors"),
    "adapter": (adapter, "adapter_config.json: an adapter is not applied"),
}
TAKEN: dict[str, Callable[[Path], object]] = {
    "as it is": lambda path: None,
    "junk": config(attn_logit_softcapping=1.0, sliding_window=4096, use_sliding_window=False, anything=[1]),
    "stored head": tensors(lambda x: x.update({HEAD: x[EMBEDDING].clone()})),
    "frequencies": tensors(
        lambda x: x.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    ),
    "frequencies in shards": lambda path: (TAKEN["frequencies"](path), split(path)),
    "shards": split,
    "no metadata": sharded(lambda index: index.pop("metadata")),
    "stale index": both_stale,
    "consolidated": lambda path: shutil.copy(path / "model.safetensors", path / "consolidated.safetensors"),
    "pickled copy": write("pytorch_model.bin", b"\x80\x02 not to be read"),
    "no kernels": config(attn_implementation="flash_attention_2"),
    "pad": config(pad_token_id=100_000),
}
"""The same policy in other clothes"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Config:
    """A run on one process."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 2)
    return parse_config(
        [
            f"model.path={model}",
            f"data.train={data}",
            f"output_dir={tmp_path / 'run'}",
            "data.max_prompt_tokens=64",
            "rollout.prompts_per_step=2",
            "rollout.max_new_tokens=64",
            "train.max_sequence_tokens=256",
            "train.max_tokens_per_microbatch=256",
        ]
    )


def readers(settings: Config, target: Path) -> dict[str, Callable[[], object]]:
    """What a user may do first with a model; all of it before any work."""
    path = Path(settings.model.path)
    return {
        "train": lambda: setup_run.read_inputs(settings),
        "dry run": lambda: setup_run.check_policy(replace(settings, dry_run=True)),
        "evaluate": lambda: evaluate.read_inputs(settings, [settings.data.train]),
        "import": lambda: import_hf(path, target, allow_pickle=False),
        "engine": lambda: load_transformers(path, torch.float32),
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_one_line_and_one_verdict(
    kind: str, model: Path, settings: Config, tmp_path: Path, single_process: None
) -> None:
    edit, words = REFUSED[kind]
    edit(model)
    for name, read in readers(settings, tmp_path / "out").items():
        if name == "dry run" and kind in ("no weights", "pickled"):
            continue  # it does without weights
        with pytest.raises(UserError) as raised:
            read()
        assert words in str(raised.value), name
        assert str(model) in str(raised.value), name
        assert "\n" not in str(raised.value), name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", TAKEN)
def test_the_same_policy_by_every_reader(
    kind: str, model: Path, settings: Config, tmp_path: Path, single_process: None
) -> None:
    """An export is one that transformers reads, too."""
    expected = load_file(TINY / "model.safetensors")
    TAKEN[kind](model)
    for read in readers(settings, tmp_path / "out").values():
        read()
    policy = SafetensorsDirectory(model)
    assert policy.file_of.keys() - {HEAD} == expected.keys()
    assert all(torch.equal(policy.read(name), x) for name, x in expected.items())
    export_hf(tmp_path / "out", tmp_path / "back", side_files=None)
    for path in (model, tmp_path / "back"):
        state = load_transformers(path, torch.float32).state_dict()
        assert all(torch.equal(state[name], x) for name, x in expected.items())
    index = tmp_path / "back" / INDEX
    assert not index.exists() or "metadata" in json.loads(index.read_text())


def test_a_stale_index_is_told_of(
    model: Path, settings: Config, tmp_path: Path, single_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "megatron_bicc")
    evaluate.read_inputs(settings, [settings.data.train])
    assert not caplog.messages
    both_stale(model)
    for read in (
        lambda: evaluate.read_inputs(settings, [settings.data.train]),
        lambda: import_hf(model, tmp_path / "out", allow_pickle=False),
        lambda: setup_run.warn_of_model(settings, supported_config(model)),
    ):
        caplog.clear()
        read()
        assert caplog.messages == [f"{model}: {INDEX} is next to model.safetensors and is not read, as in "
                                   "transformers"]  # fmt: skip
    assert largest_difference(model, tmp_path / "out", prompts=2)[0] < 1e-3


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "stale index",
            "both model.safetensors and model.safetensors.index.json exist: SGLang reads a.safe",
        ),
        ("consolidated", ""),
        ("shards", ""),
        ("more files", "SGLang reads more.safetensors and transformers does not; remove the surplus file"),
        ("interleaved", "rope_is_neox_style is False, which SGLang computes and the policy does not"),
    ],
)
def test_what_sglang_would_read_otherwise(
    kind: str, words: str, model: Path, settings: Config, caplog: pytest.LogCaptureFixture
) -> None:
    edits = TAKEN | {
        "more files": lambda path: shutil.copy(path / "model.safetensors", path / "more.safetensors"),
        "interleaved": config(rope_is_neox_style=False),
    }
    edits[kind](model)
    settings.rollout.engine = "sglang"
    if not words:
        setup_run.check_policy(settings)
        return
    with pytest.raises(UserError, match=words):
        setup_run.check_policy(settings)
    settings.rollout.launch = "attach"  # the server has files of its own
    setup_run.check_policy(settings)


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_untied", "qwen2", "llama3", "gemma3", "qwen3_moe"])
def test_expected_shapes_are_megatrons(
    family: str, model_dirs: dict[str, Path], single_process: None
) -> None:
    hf_config = supported_config(model_dirs[family])
    slots, _ = slots_of(hf_config)
    theirs = {
        name: tuple(shape)
        for slot in slots
        for name, shape in zip(slot.hf_names, slot.hf_shapes(hf_config), strict=True)
    }
    assert expected_shapes(hf_config) == theirs


LENGTHS = [
    (["rollout.max_new_tokens=2048", "data.max_prompt_tokens=32"], "32 + 2048 = 2080; .* has 1024 positions"),
    (["rollout.max_new_tokens=992", "data.max_prompt_tokens=32"], ""),
    (["rollout.max_new_tokens=993", "data.max_prompt_tokens=32"], "32 + 993 = 1025; .* has 1024 positions"),
    (
        [
            "rollout.engine=sglang",
            "rollout.sglang.python=python3",
            "rollout.sglang.server_args=--context-len 100",
        ],
        "64 \\+ 64 = 128; .* has 100 positions",
    ),
    (
        [
            "rollout.engine=sglang",
            "rollout.sglang.python=python3",
            "rollout.sglang.server_args=--context-length=128",
        ],
        "",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), LENGTHS)
def test_rollouts_longer_than_the_model(
    arguments: list[str], words: str, settings: Config, tmp_path: Path
) -> None:
    sizes = ("train.max_sequence_tokens=4096", "train.max_tokens_per_microbatch=4096")
    given = [f"model.path={settings.model.path}", f"data.train={settings.data.train}", *sizes]
    given += [f"output_dir={tmp_path / 'run'}", "data.max_prompt_tokens=64", "rollout.max_new_tokens=64"]
    given += ["rollout.prompts_per_step=2"]
    own = parse_config(["dry_run=true", *given, *arguments])
    for read in (setup_run.read_inputs, lambda c: dry_run(c, 1)):
        if words:
            with pytest.raises(UserError, match=words.replace(" + ", r" \+ ")):
                read(own)
        elif read is setup_run.read_inputs:
            read(own)


def test_contexts_longer_than_the_model(settings: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "megatron_bicc")
    settings.bicc.enabled, settings.train.max_sequence_tokens = True, 1024
    setup_run.warn_of_model(settings, supported_config(TINY))
    assert not caplog.messages
    settings.train.max_sequence_tokens = 1025
    setup_run.warn_of_model(settings, supported_config(TINY))
    assert "train.max_sequence_tokens is 1025" in caplog.messages[0]
    assert "has 1024 positions" in caplog.messages[0]


def test_probably_unintended_settings_are_named(settings: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "megatron_bicc")
    settings.loss.objective, settings.parallel.context = "mine.py:f", 1
    setup_run.warn_of_model(settings, supported_config(TINY))
    assert not caplog.messages
    settings.parallel.context, settings.rollout.max_staleness = 2, 1
    setup_run.warn_of_model(settings, supported_config(TINY))
    assert "loss.correction is none" in caplog.messages[0]
    assert "the function gets a part of a response's rows" in caplog.messages[1]


def test_an_evaluation_goes_by_the_longest_prompt(settings: Config) -> None:
    settings.data.max_prompt_tokens, settings.rollout.max_new_tokens = 4096, 1018
    evaluate.read_inputs(settings, [settings.data.train])
    settings.rollout.max_new_tokens = 1020
    with pytest.raises(
        UserError, match=r"row 1: the prompt's 6 tokens \+ .*1020 make 1026; .* 1024 positions"
    ):
        evaluate.read_inputs(settings, [settings.data.train])


@pytest.mark.parametrize("setting", ["rollout.engine", "loss.objective", "loss.baseline", "data.filter"])
@pytest.mark.parametrize("path", ["no_module:f", "no_file.py:f", "math:", "math:pi"])
def test_an_import_path_is_loaded_before_anything_else(
    setting: str, path: str, settings: Config, tmp_path: Path
) -> None:
    section, field = setting.split(".")
    changed = replace(settings, output_dir=str(tmp_path / "run"), dry_run=True, algorithm="grpo")
    changed = replace(changed, **{section: replace(getattr(changed, section), **{field: path})})
    with pytest.raises(UserError, match=setting):
        setup_run.check_settings(changed)
