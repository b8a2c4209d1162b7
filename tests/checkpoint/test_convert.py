"""Tests conversion in one process: bit-exact round trips, and one line for everything that does not fit."""

import importlib.util
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model

from megatron_bicc.checkpoint import convert
from megatron_bicc.checkpoint.compare_logits import largest_difference
from megatron_bicc.checkpoint.convert import export_hf, import_hf
from megatron_bicc.collective import shared_atomic_directory
from megatron_bicc.config import ParallelConfig
from megatron_bicc.errors import UserError
from megatron_bicc.files import check_disk
from megatron_bicc.model.families import check_layout, supported_config
from megatron_bicc.weights.hf_files import side_files

REPOSITORY = Path(__file__).parents[2]
SIDE = {
    "tokenizer.json": '{"made": "up"}',
    "tokenizer_config.json": "{ }",
    "generation_config.json": '{"top_k":  7}\n',
    "merges.txt": "a b\n",
}


def hf_directory(path: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A random model of support.models with files beside it."""
    make_model(name).to(dtype).save_pretrained(path, max_shard_size=shard)
    for file, text in SIDE.items():
        (path / file).write_text(text)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    return {name: x for file in path.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_same(ours: Path, theirs: Path) -> None:
    """The same files with the same bytes; the same tensors, bit for bit, in the same safetensors files."""
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    for file in theirs.iterdir():
        if file.suffix == ".safetensors":
            mine, his = load_file(ours / file.name), load_file(file)
            assert mine.keys() == his.keys()
            for name, tensor in his.items():
                assert mine[name].dtype == tensor.dtype
                assert torch.equal(mine[name].view(torch.uint8), tensor.view(torch.uint8)), name
        else:
            assert (ours / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        ("qwen3_tied", torch.bfloat16, "5GB"),
        ("qwen3_untied", torch.float32, "20kB"),
        ("qwen2", torch.float16, "20kB"),
        ("llama3", torch.bfloat16, "20kB"),
        ("gemma3", torch.bfloat16, "20kB"),
        ("qwen3_moe", torch.bfloat16, "20kB"),
        ("qwen2_moe", torch.bfloat16, "20kB"),
    ],
)
def test_round_trip_is_bit_exact(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path, single_process: None
) -> None:
    source = hf_directory(tmp_path / "hf", name, dtype, shard)
    assert len(list(source.glob("*.safetensors"))) > 1 or shard == "5GB"
    import_hf(source, tmp_path / "megatron", allow_pickle=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", side_files=None)
    assert_same(tmp_path / "back", source)
    assert not list(tmp_path.glob("*.partial"))


def test_logits_equal_transformers_until_a_weight_changes(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen2")
    import_hf(source, tmp_path / "megatron", allow_pickle=False)
    difference, largest = largest_difference(source, tmp_path / "megatron", prompts=2, length=40)
    assert difference < 1e-5 * largest
    change(source, lambda x: x["model.layers.1.self_attn.k_proj.bias"].mul_(1.5))
    assert largest_difference(source, tmp_path / "megatron", prompts=2, length=40)[0] > 1e-2


def test_stored_copy_of_a_tied_output_layer(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_tied")
    change(source, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()}))
    import_hf(source, tmp_path / "megatron", allow_pickle=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", side_files=None)
    assert_same(tmp_path / "back", source)
    change(source, lambda x: x["lm_head.weight"].add_(1))
    refused(source, tmp_path, "tensor lm_head.weight differs from model.embed_tokens.weight")


def command(*arguments: object) -> int:
    """Exit status of tools/convert_hf_checkpoint.py, in this process."""
    path = REPOSITORY / "tools/convert_hf_checkpoint.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run([str(argument) for argument in arguments])


def change(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the tensors of a single-file model."""
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def refused(source: Path, tmp_path: Path, words: str) -> None:
    """An import that ends in one line and leaves nothing under the final name."""
    with pytest.raises(UserError, match=words) as raised:
        import_hf(source, tmp_path / "refused", allow_pickle=False)
    assert "\n" not in str(raised.value)
    assert str(source) in str(raised.value)
    assert not (tmp_path / "refused").exists()


Q = "model.layers.1.self_attn.q_proj.weight"
EDITS = {
    "missing": (lambda x: x.pop(Q), f"tensor {Q} is missing"),
    "unexpected": (lambda x: x.update(extra=x[Q].clone()), "tensor extra is not part of a Qwen3ForCausalLM"),
    "shape": (lambda x: x.update({Q: x[Q][:-1].clone()}), rf"tensor {Q} has shape \(127, 48\); config"),
    "type": (lambda x: x.update({Q: x[Q].half()}), f"tensor {Q} is torch.float16 and .* is torch.float32"),
    "integers": (lambda x: x.update({Q: x[Q].int()}), f"tensor {Q} is not of float32"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_tensors_that_do_not_fit(kind: str, tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_untied")
    edit, words = EDITS[kind]
    change(source, edit)
    refused(source, tmp_path, words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    bad: float, tmp_path: Path, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the import, and by the export of a checkpoint that another program or an older version wrote."""
    source = hf_directory(tmp_path / "hf", "qwen3_untied")
    change(source, lambda x: x[Q][-1, -1].fill_(bad))
    refused(source, tmp_path, f"tensor {Q} contains NaN or infinite values")
    with monkeypatch.context() as older:
        older.setattr(convert, "is_finite", lambda *_: True)
        import_hf(source, tmp_path / "megatron", allow_pickle=False)
    with pytest.raises(UserError, match=f"megatron: tensor {Q} contains NaN or infinite values"):
        export_hf(tmp_path / "megatron", tmp_path / "back", side_files=None)
    assert not list(tmp_path.glob("back*"))


def test_damaged_files(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_untied", shard="20kB")
    shard = sorted(source.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    refused(source, tmp_path, f"{shard.name}: cannot be read")
    shard.unlink()
    refused(source, tmp_path, f"{shard.name}: cannot be read")
    shard.write_bytes(sorted(source.glob("*.safetensors"))[0].read_bytes())
    refused(source, tmp_path, f"{shard.name}: does not contain tensor")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../elsewhere.safetensors"))
    refused(source, tmp_path, "names a file outside of its directory")


def test_configurations_that_are_not_supported(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_untied")
    config = json.loads((source / "config.json").read_text())
    for change, words in (
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported"),
        ({"model_type": "unheard", "auto_map": {"AutoConfig": "code.Remote"}}, "config.json: cannot be used"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        (source / "code.py").write_text("raise SystemExit('remote code ran')")
        refused(source, tmp_path, words)
    (source / "config.json").unlink()
    refused(source, tmp_path, "there is no Hugging Face config.json")


def test_pickles_are_read_only_when_asked(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen2")
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, "there is no model.safetensors")
    torch.save(state, source / "pytorch_model.bin")
    refused(source, tmp_path, "contains pickled tensors only; .* import --allow-pickle")
    assert command("import", source, tmp_path / "megatron", "--allow-pickle") == 0
    export_hf(tmp_path / "megatron", tmp_path / "back", side_files=None)
    found = tensors(tmp_path / "back")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


class Hostile:
    """A pickle that runs a command where it is loaded as any pickle is."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_pickles_run_no_code(tmp_path: Path, single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = hf_directory(tmp_path / "hf", "qwen2")
    (source / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, source / "pytorch_model.bin")
    refusal = r"cannot be read: damaged, or it contains more than tensors$"
    with pytest.raises(UserError, match=refusal) as raised:
        import_hf(source, tmp_path / "megatron", allow_pickle=True)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_command(tmp_path: Path, single_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    source, megatron, back = hf_directory(tmp_path / "hf", "qwen2"), tmp_path / "megatron", tmp_path / "back"
    capsys.readouterr()
    assert command("import", source, megatron, "--tp", 4) == 2
    assert capsys.readouterr().err == (
        "convert_hf_checkpoint: error: parallel.tensor=4 does not divide the model's num_key_value_heads=2\n"
    )
    assert command("import", source, megatron, "--tp", 2, "--pp", 2) == 0
    assert command("export", megatron, back) == 0
    assert_same(back, source)
    assert command("verify", source, megatron) == 0
    assert capsys.readouterr().out.startswith("largest difference of a logit ")
    change(source, lambda x: x["model.norm.weight"].mul_(1.01))
    assert command("verify", source, megatron) == 1
    assert command("verify", source, megatron, "--tolerance", 0.1) == 0


def test_verify_names_weights_that_are_missing(
    tmp_path: Path, single_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, megatron = hf_directory(tmp_path / "hf", "qwen3_tied"), tmp_path / "megatron"
    assert command("import", source, megatron) == 0
    change(source, lambda state: state.pop("model.norm.weight"))
    assert command("verify", source, megatron) == 2
    assert capsys.readouterr().err.endswith(f"error: {source}: tensor model.norm.weight is missing\n")
    (source / "model.safetensors").unlink()
    assert command("verify", source, megatron) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{source}: there is no model.safetensors" in line


def test_layouts_that_do_not_divide(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_tied")
    with pytest.raises(
        UserError, match="parallel.tensor=4 does not divide the model's num_key_value_heads=2"
    ):
        check_layout(supported_config(source), ParallelConfig(tensor=4))


@pytest.mark.parametrize("file", ["__0_0.distcp", "common.pt", "hf/merges.txt"])
def test_flipped_bit_is_named(
    file: str, tmp_path: Path, single_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written, or compared."""
    source, megatron = hf_directory(tmp_path / "hf", "qwen2"), tmp_path / "megatron"
    import_hf(source, megatron, allow_pickle=False)
    capsys.readouterr()
    data = bytearray((megatron / file).read_bytes())
    data[len(data) // 2] ^= 4
    (megatron / file).write_bytes(data)
    for arguments in (("export", megatron, tmp_path / "back"), ("verify", source, megatron)):
        assert command(*arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{megatron / file} is damaged: it is not what manifest.json says" in line
    assert not list(tmp_path.glob("back*"))


def test_manifest_that_is_none(tmp_path: Path, single_process: None) -> None:
    source, megatron = hf_directory(tmp_path / "hf", "qwen2"), tmp_path / "megatron"
    import_hf(source, megatron, allow_pickle=False)
    (megatron / "manifest.json").write_text('["common.pt"]')
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        export_hf(megatron, tmp_path / "back", side_files=None)
    (megatron / "manifest.json").unlink()  # as older versions imported
    export_hf(megatron, tmp_path / "back", side_files=None)
    assert_same(tmp_path / "back", source)


def test_damaged_checkpoints(tmp_path: Path, single_process: None) -> None:
    source, megatron = hf_directory(tmp_path / "hf", "qwen3_untied"), tmp_path / "megatron"
    import_hf(source, megatron, allow_pickle=False)
    (megatron / "manifest.json").unlink()
    other = hf_directory(tmp_path / "other", "qwen2")
    with pytest.raises(UserError, match="linear_proj.weight has shape .* requires"):
        export_hf(megatron, tmp_path / "back", side_files=other)
    data = next(megatron.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        export_hf(megatron, tmp_path / "back", side_files=None)
    with pytest.raises(UserError, match="not a distributed checkpoint"):
        export_hf(source, tmp_path / "back", side_files=source)
    assert not (tmp_path / "back").exists()


def test_interrupted_writes_leave_nothing_under_the_name(tmp_path: Path, single_process: None) -> None:
    with pytest.raises(KeyboardInterrupt), shared_atomic_directory(tmp_path / "out") as partial:
        (partial / "half").write_text("a")
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/half").write_text("left by a kill")
    with shared_atomic_directory(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
    with pytest.raises(UserError, match="already exists"), shared_atomic_directory(tmp_path / "out"):
        pass


def test_disk_that_is_too_small(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path / "out", free // 2)
    with pytest.raises(UserError, match=rf"out: needs [\d,]+ bytes, but {tmp_path} has [\d,]+ bytes free"):
        check_disk(tmp_path / "out", free * 2)


@pytest.mark.parametrize("end", ["import", "export"])
def test_write_that_fails(end: str, tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_untied")
    import_hf(source, tmp_path / "megatron", allow_pickle=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: .*(File too large|disk full)") as raised:
            if end == "import":
                import_hf(source, tmp_path / "out", allow_pickle=False)
            else:
                export_hf(tmp_path / "megatron", tmp_path / "out", side_files=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["/", ".", "", "a\0b", "a" * 300, "a" * 250, "a" * 300 + "/b", "dangling"])
def test_names_that_no_directory_can_have(
    name: str,
    tmp_path: Path,
    single_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = hf_directory(tmp_path / "hf", "qwen2")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Path("dangling").symlink_to("nowhere")
    capsys.readouterr()
    assert command("import", source, name) == 2
    [line] = capsys.readouterr().err.splitlines()
    end = "already exists; choose another directory or delete it" if name == "dangling" else ""
    end = end or ("File name too long" if name.startswith("aa") else "new directory; choose another")
    assert end in line
    assert [path.name for path in Path().iterdir()] == ["dangling"]


def test_directories_among_the_side_files_are_left_out(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen2")
    for name in ("tokens", "vocab.d"):
        (source / name).mkdir()
    import_hf(source, tmp_path / "megatron", allow_pickle=False)
    assert {path.name for path in (tmp_path / "megatron/hf").iterdir()} >= SIDE.keys()
    assert side_files(source) == sorted(source / name for name in ("config.json", *SIDE))


def test_file_that_cannot_be_read_is_named(tmp_path: Path, single_process: None) -> None:
    (tmp_path / "hf").mkdir()
    with (
        pytest.raises(UserError, match=f"out: cannot be written: No such file .*: {tmp_path}/hf/token$"),
        shared_atomic_directory(tmp_path / "out") as partial,
    ):
        shutil.copyfile(tmp_path / "hf/token", partial / "token")


@pytest.mark.parametrize("size", [0, -4])
@pytest.mark.parametrize(
    "name", ["num_attention_heads", "num_key_value_heads", "hidden_size", "num_experts_per_tok"]
)
def test_sizes_of_nothing(name: str, size: int, tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {name: size}))
    refused(source, tmp_path, f"{name} is {size} in config.json; it must be a number of at least 1")


def test_verify_refuses_what_the_model_does_not_reach(
    tmp_path: Path, single_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, megatron = hf_directory(tmp_path / "hf", "qwen2"), tmp_path / "megatron"
    import_hf(source, megatron, allow_pickle=False)
    assert command("verify", source, megatron, "--length", 512, "--prompts", 1) == 0
    assert command("verify", source, megatron, "--length", 513, "--prompts", 1) == 2
    assert "max_position_embeddings is 512; --length 513 is longer" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5"])
def test_numbers_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("import", "a", "b", f"--tp={value}")
    assert f"argument --tp: {value!r} is not a whole number of at least 1" in capsys.readouterr().err


def test_export_of_a_training_checkpoint_asks_for_hf(tmp_path: Path, single_process: None) -> None:
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(UserError, match="step_00000001: there is no hf/ in it .* by --hf"):
        export_hf(tmp_path / "step_00000001", tmp_path / "back", side_files=None)


def test_pickle_of_something_else(tmp_path: Path, single_process: None) -> None:
    source = hf_directory(tmp_path / "hf", "qwen2")
    (source / "model.safetensors").unlink()
    torch.save([1, 2], source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: contains no dictionary of tensors"):
        import_hf(source, tmp_path / "megatron", allow_pickle=True)


def test_directory_that_cannot_be_made(tmp_path: Path, single_process: None) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        shared_atomic_directory(tmp_path / "file" / "out"),
    ):
        pass
