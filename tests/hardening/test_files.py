from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hardening.files import load_tensors, save_tensors, write_atomically


def test_folders_are_made_and_nothing_is_left_beside(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.json", b"one")
    write_atomically(tmp_path / "a" / "b.json", b"two")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()] == [("b.json", b"two")]


def test_a_failure_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "x", "text")  # type: ignore[arg-type]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    content = {"state": {"a": torch.rand(3)}, "history": [{"loss": 0.1}], "best": float("-inf")}
    save_tensors(tmp_path / "x.pt", content)
    found = load_tensors(tmp_path / "x.pt")
    assert torch.equal(found["state"]["a"], content["state"]["a"])  # type: ignore[index]
    assert (found["history"], found["best"]) == (content["history"], content["best"])


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"state_dict": _Code(marker)}, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(tmp_path / "x.pt")
    assert not marker.exists()
