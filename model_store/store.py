"""The store: `<store>/<name>/<integer version>/`, Triton's layout. A version appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_store.errors import BundleError
from model_store.manifest import MANIFEST_FILE, Manifest

EMBEDDED_STORE = Path(__file__).parent / "bundles"
DEFAULT_BUNDLE = "photos"


def versions(store: Path, name: str) -> list[int]:
    """The version numbers of a bundle, ascending. As in Triton, other folders and leading zeros are ignored."""
    folder = store / name
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name.isascii() and entry.name.isdigit() and not entry.name.startswith("0")
    )


def names(store: Path) -> list[str]:
    """The names of all bundles in the store that have a version, sorted."""
    if not store.is_dir():
        return []
    return sorted(entry.name for entry in store.iterdir() if entry.is_dir() and versions(store, entry.name))


def resolve(store: Path, wanted: str) -> Path:
    """The folder of `name` (its newest version) or `name/version`. BundleError says what there is instead."""
    name, _, version = wanted.partition("/")
    available = versions(store, name) if name and name not in (".", "..") else []
    if not available:
        there = ", ".join(names(store)) or "nothing"
        raise BundleError(wanted, f"there is no bundle of this name; the store holds {there}")
    if not version:
        return store / name / str(available[-1])
    if not version.isdigit() or int(version) not in available:
        there = ", ".join(map(str, available))
        raise BundleError(wanted, f"there is no version {version!r} of {name}; there are {there}")
    return store / name / version


@contextmanager
def publishing(store: Path, name: str) -> Iterator[Publication]:
    """Write a new version beside its place; `Publication.seal` moves it there. What is not sealed leaves no trace."""
    folder = store / name
    folder.mkdir(parents=True, exist_ok=True)
    # A leading dot: neither Triton nor `versions` takes a half-written folder for a version.
    incoming = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder))
    incoming.chmod(0o755)
    try:
        yield Publication(folder, incoming)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()


class Publication:
    """A version in the making: put files into `path`, then `seal` it."""

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder = folder
        self.path = path

    def seal(self, manifest: Manifest) -> Path:
        """Hash the files, write the manifest, give the version its number and move it into place; returns its folder.

        `manifest.version` and `manifest.files` are filled in here.
        """
        files = {
            file.relative_to(self.path).as_posix(): _sha256_synced(file)
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file.name != MANIFEST_FILE
        }
        while True:
            version = max(versions(self._folder.parent, self._folder.name), default=0) + 1
            sealed = manifest.model_copy(update={"version": version, "files": files})
            target = self.path / MANIFEST_FILE
            target.write_bytes(sealed.sealed_bytes())
            _sha256_synced(target)
            place = self._folder / str(version)
            try:
                os.rename(self.path, place)
            except OSError:
                if not place.exists():
                    raise
                continue  # somebody else took this number meanwhile
            return place


def _sha256_synced(file: Path) -> str:
    with file.open("rb+") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
    return digest
