"""Tests that a file or directory is either the old or the complete new one, whenever its writer stops."""

from pathlib import Path

import pytest

from megatron_bicc.errors import UserError
from megatron_bicc.files import atomic_directory, atomic_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_directory(target) as partial:
        (partial / "whole").touch()
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]
    with pytest.raises(UserError, match="already exists"), atomic_directory(target):
        pass
