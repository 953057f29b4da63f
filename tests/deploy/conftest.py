from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.service.support import ThreadServer, png, thread_server
from tests.support.tiny_bundle import noisy_images


@pytest.fixture(scope="session")
def gate(tiny_bundle: Path) -> Iterator[ThreadServer]:
    """A gate that serves the tiny bundle."""
    with thread_server(Settings(store=tiny_bundle.parents[1], bundle="tiny", threads=1)) as running:
        yield running


@pytest.fixture(scope="session")
def suspicious() -> bytes:
    """A picture that the tiny bundle always flags."""
    return png(noisy_images(1, 32, seed=99)[0])
