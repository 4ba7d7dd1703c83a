"""Files are whole or absent; a torn one is an error with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedistill.experts import trajectory
from fedistill.files import BrokenFile, read_about, read_json, read_tensors, write_json, write_tensors


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_torn_file_names_itself(tmp_path: Path, share: float) -> None:
    tensors, plain = tmp_path / "a.safetensors", tmp_path / "a.json"
    parts = {"first": torch.zeros(50), "steps": torch.ones(2, 50), "scale": torch.ones(2)}
    write_tensors(tensors, parts, {"step": 3})
    write_json(plain, {"a": list(range(100))})
    assert read_about(tensors) == {"step": 3}
    assert trajectory.read(tensors, 2).shape == (3, 50)
    for file in (tensors, plain):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
    for read, file in ((read_tensors, tensors), (lambda f: trajectory.read(f, 2), tensors), (read_json, plain)):
        with pytest.raises(BrokenFile, match="remove it") as error:
            read(file)
        assert error.value.code == "broken-file"
        assert str(file) in error.value.sentence


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for read in (read_tensors, read_about, read_json):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
