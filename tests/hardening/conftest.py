"""Fixtures of the hardening tests: everything small, drawn from a seed, on one thread."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from hardening.calibrate import Calibrated, assemble, calibrate
from hardening.data import Dataset, prepare
from hardening.encoders import Encoder
from hardening.progress import Bars, Task
from hardening.recipe import Splits
from model_store.pixels import PixelRule
from tests.support.patterns import trained_encoder, write_patterns


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small networks are quickest on one thread, and sums then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class QuietBars(Bars):
    """Bars that remember what was said."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Interrupted(Exception):
    """What `InterruptingBars` raise."""


class InterruptingBars(QuietBars):
    """Bars that stop the work in its middle, as Ctrl-C would: at the n-th step of any task."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        with super().task(description, total) as task:
            yield _InterruptingTask(self, task)


class _InterruptingTask(Task):
    def __init__(self, bars: InterruptingBars, task: Task) -> None:
        self._bars = bars
        self._task = task

    def advance(self, by: int = 1, note: str | None = None) -> None:
        self._bars.left -= 1
        if self._bars.left < 0:
            raise Interrupted
        self._task.advance(by, note)


@pytest.fixture
def bars() -> QuietBars:
    return QuietBars()


@pytest.fixture(scope="session")
def trained_toy() -> Encoder:
    return trained_encoder()


@pytest.fixture
def toy_encoder(trained_toy: Encoder) -> Encoder:
    """A tiny network that knows the patterns of tests.support.patterns, 16 x 16; a copy for each test."""
    return copy.deepcopy(trained_toy)


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Labelled patterns in their splits."""
    folder = tmp_path_factory.mktemp("toy")
    root = write_patterns(folder / "root", train=80, test=15)
    splits = Splits(local=0.3, validation=0.1, fit=0.25, calibration=0.35)
    return prepare(root, PixelRule(height=16, width=16), splits, 0, folder / "data", QuietBars())


@pytest.fixture(scope="session")
def toy_calibrated(toy_dataset: Dataset, trained_toy: Encoder) -> Calibrated:
    """A calibrated gate whose victim is undefended, with the other branches other networks; read only."""
    tuned = {"victim": trained_encoder(seed=1), "auxiliary": trained_encoder(seed=2), "bmp": trained_encoder(seed=3)}
    sample = toy_dataset.images[toy_dataset.splits["fit"][:8]]
    views = assemble(copy.deepcopy(trained_toy), tuned, sample)
    return calibrate(views, toy_dataset, "consistency", "cpu", QuietBars())
