"""Fixtures of the hardening tests: everything small, drawn from a seed, on one thread."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from hardening.encoders import Encoder
from hardening.progress import Bars, Task
from tests.support.patterns import trained_encoder


@pytest.fixture(autouse=True)
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
def _toy_encoder() -> Encoder:
    return trained_encoder()


@pytest.fixture
def toy_encoder(_toy_encoder: Encoder) -> Encoder:
    """A tiny network that knows the patterns of tests.support.patterns, 16 x 16; a copy for each test."""
    return copy.deepcopy(_toy_encoder)
