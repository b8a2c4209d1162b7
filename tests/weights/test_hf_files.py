"""Tests that a directory's headers are read once, and that fingerprints differ between directories."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.models import make_model
from support.steps import make_config

from megatron_bicc.model.families import supported_config
from megatron_bicc.weights.hf_files import SafetensorsDirectory, checked_tensors, fingerprint
from megatron_bicc.weights.hf_weights import load_policy


def test_checks_and_policy_read_each_header_once(
    tmp_path: Path, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("qwen3_untied").save_pretrained(tmp_path, max_shard_size="60kB")
    read, names = SafetensorsDirectory._header, []
    monkeypatch.setattr(
        SafetensorsDirectory, "_header", lambda self, name: names.append(name) or read(self, name)
    )
    tensors = checked_tensors(tmp_path, supported_config(tmp_path))
    load_policy(make_config(tmp_path, "grpo"), tensors)
    assert len(names) > 1
    assert sorted(names) == sorted(file.name for file in tmp_path.glob("*.safetensors"))


def test_fingerprint_is_of_the_content(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    source = model_dirs["qwen3_tied"]
    copy = shutil.copytree(source, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(source)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    files, weights = fingerprint(source)
    assert fingerprint(copy)[0] == files and fingerprint(copy)[1] != weights
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint(copy)[0] != files
