from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cli.conftest import Process, Twogate

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the pipeline would have been asked for."""
    calls: Calls = []
    pipeline = ModuleType("hardening.pipeline")

    def harden(*arguments: Any) -> Path:
        calls.append(arguments)
        return Path("store/x/1")

    pipeline.harden = harden  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hardening.pipeline", pipeline)
    return calls


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\n")
    return file


def test_arguments_reach_the_pipeline(twogate: Twogate, calls: Calls, recipe: Path, tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    given = ["--data", tmp_path, "--store", store]
    result = twogate("harden", recipe, *given, "--run", run, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, "store/x/1\n")
    assert twogate("harden", recipe, *given).exit_code == 0
    assert calls == [(recipe, tmp_path, store, run, "cpu"), (recipe, tmp_path, store, None, "auto")]


def test_without_torch_the_extra_is_named(
    twogate: Twogate, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hardening.pipeline", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = twogate("harden", recipe, "--data", tmp_path, "--store", tmp_path)
    assert result.exit_code == 1
    assert "torch" in result.stderr
    assert "twogate[harden]" in result.stderr


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_hand_it_says_how_to_go_on(
    twogate: Twogate, calls: Calls, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: int, code: int
) -> None:
    def stop(*_: object) -> None:
        signal.raise_signal(how)

    monkeypatch.setattr(sys.modules["hardening.pipeline"], "harden", stop)
    result = twogate("harden", recipe, "--data", tmp_path, "--store", tmp_path)
    assert result.exit_code == code
    assert "goes on where it stopped" in result.stderr


def test_a_recipe_or_data_that_is_not_there_is_wrong_usage(process: Process, recipe: Path, tmp_path: Path) -> None:
    assert process("harden", "nowhere.yaml", "--data", tmp_path, "--store", tmp_path).returncode == 2
    result = process("harden", recipe, "--data", "nowhere", "--store", tmp_path)
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
