"""Fixtures that every room's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_bundle import make_tiny_bundle

REPOSITORY = Path(__file__).parent.parent
PHOTOS = REPOSITORY / "examples" / "photos"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger data sets beside the checkout; tests that need it are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny bundle, `<store>/tiny/1`; read only, because the whole run shares it."""
    return make_tiny_bundle(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Four of the CC0 photographs, JPEG."""
    return [PHOTOS / f"{name}-clean.jpg" for name in ("dress", "hat", "shoes", "t-shirt")]


@pytest.fixture(scope="session")
def photo(photos: list[Path]) -> bytes:
    """The bytes of one CC0 photograph, JPEG."""
    return photos[0].read_bytes()
