from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from model_store.bundle import Bundle, load_bundle
from service.settings import Settings
from tests.service.support import ThreadServer, png, thread_server
from tests.support.tiny_bundle import noisy_images


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TWOGATE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="session")
def make_settings(tiny_bundle: Path) -> Callable[..., Settings]:
    """Settings that serve the tiny bundle, with changes."""

    def make(**changes: Any) -> Settings:
        return Settings(**{"store": tiny_bundle.parents[1], "bundle": "tiny", "threads": 1, **changes})

    return make


@pytest.fixture(scope="session")
def server(make_settings: Callable[..., Settings]) -> Iterator[ThreadServer]:
    """One server with default limits, which the whole run shares."""
    with thread_server(make_settings()) as running:
        yield running


@pytest.fixture
def client(server: ThreadServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as running:
        yield running


@pytest.fixture(scope="session")
def noise() -> NDArray[np.uint8]:
    """A picture [32, 32, 3] that the tiny bundle always flags."""
    return noisy_images(1, 32, seed=99)[0]


@pytest.fixture(scope="session")
def suspicious(noise: NDArray[np.uint8]) -> bytes:
    """The same, as PNG."""
    return png(noise)
