from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from tests.conftest import REPOSITORY
from tests.support.tiny_bundle import make_tiny_bundle

Twogate = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests reaches them; wide output, no colours."""
    for name in [name for name in os.environ if name.startswith("TWOGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def twogate() -> Twogate:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """Run a command as people do, in a process and a folder of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def store(tiny_bundle: Path) -> Path:
    """A store that holds tiny/1; read only."""
    return tiny_bundle.parent.parent


@pytest.fixture
def own_store(tmp_path: Path) -> Path:
    """A store to damage, which holds tiny/1 and tiny/2."""
    store = tmp_path / "own-store"
    make_tiny_bundle(store)
    make_tiny_bundle(store, seed=1)
    return store


@pytest.fixture
def folder(tmp_path: Path, photos: list[Path]) -> Path:
    """A folder of four photographs in two levels, a broken image, a text, a hidden file and a hidden folder."""
    folder = tmp_path / "pictures"
    (folder / "below" / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for photo, place in zip(photos, ("b.jpg", "a.jpg", "below/c.jpg", "below/deeper/d.jpg"), strict=True):
        shutil.copy(photo, folder / place)
    (folder / "below" / "broken.jpg").write_bytes(photos[0].read_bytes()[:900])
    (folder / "notes.txt").write_text("not an image")
    shutil.copy(photos[0], folder / ".hidden" / "e.jpg")
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


FOLDER_ROWS = ["a.jpg", "b.jpg", "notes.txt", "below/broken.jpg", "below/c.jpg", "below/deeper/d.jpg"]
"""What `folder` holds, in the order of the rows: a folder's own files first, each level sorted."""
