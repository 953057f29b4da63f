"""The store: `<store>/<name>/<integer version>/`, Triton's layout. A version appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model_store.errors import BundleError, TwogateError
from model_store.manifest import MANIFEST_FILE, NAME_PATTERN, Manifest, read_manifest

EMBEDDED_STORE = Path(__file__).parent / "bundles"
DEFAULT_BUNDLE = "photos"
_INCOMING = ".incoming-"  # a leading dot: neither Triton nor `versions` takes a half-written folder for a version
_A_DAY_S = 24 * 3600


class StoreError(TwogateError):
    """The store does not take a new version."""


def versions(store: Path, name: str) -> list[int]:
    """The version numbers of a bundle, ascending. As in Triton, other folders and leading zeros are ignored."""
    folder = store / name
    if not re.fullmatch(NAME_PATTERN, name) or not folder.is_dir():
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
    """The folder of `name` (its newest version) or `name/version`. BundleError says what there is instead.

    A folder that holds another bundle than its name and number say is refused: all that is made from it, and every answer,
    would go by another name than the one that was asked for.
    """
    name, _, version = wanted.partition("/")
    available = [str(number) for number in versions(store, name)]
    if not available:
        there = ", ".join(names(store)) or "nothing"
        raise BundleError(wanted, f"there is no bundle of this name; the store holds {there}")
    if version and version not in available:
        raise BundleError(wanted, f"there is no version {version!r} of {name}; there are {', '.join(available)}")
    label = f"{name}/{version or available[-1]}"
    others = [f"{name}/{one}" for one in available[:-1]]
    hint = f"; that is the highest number, there are also {', '.join(others)}" if others and not version else ""
    try:
        manifest = read_manifest(store / label)
    except BundleError as error:
        raise BundleError(error.file, f"{error.reason}{hint}", label) from None
    published = f"{manifest.name}/{manifest.version}"
    if published != label:
        raise BundleError(
            label,
            f"the folder holds {published}, and a bundle keeps the name and number that it was published under: move it "
            f"there, or let `twogate bundle import FOLDER` give it the next number{hint}",
        )
    return store / label


@contextmanager
def publishing(store: Path, name: str) -> Iterator[Publication]:
    """Write a new version beside its place; `Publication.seal` moves it there. What is not sealed leaves no trace.

    BundleError where `name` cannot be a bundle's name.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise BundleError(name, "a bundle's name has up to 64 of a-z 0-9 . _ - and begins with a letter or digit")
    folder = store / name
    _sweep(folder)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another publisher may just have tidied the empty folder away
            incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=folder))
            break
    incoming.chmod(0o755)
    try:
        yield Publication(folder, incoming)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
        with suppress(OSError):  # not empty: it holds versions
            folder.rmdir()


def try_store(store: Path, name: str, instead: str = "name another one with --store") -> None:
    """StoreError where nothing could be published there, and what to do `instead`: said now, and not after hours of work."""
    made = [folder for folder in (store, *store.parents) if not folder.exists()]
    try:
        with publishing(store, name):
            pass
    except OSError as error:
        raise StoreError(f"the store {store} cannot be written ({error.strerror}); {instead}") from None
    with suppress(OSError):  # another run may have put something there since
        for folder in made:
            folder.rmdir()


def _sweep(folder: Path) -> None:
    """Remove what killed publishers left a day ago or longer; none takes so long."""
    for left in list(folder.glob(f"{_INCOMING}*")):
        with suppress(OSError):
            if left.lstat().st_mtime < time.time() - _A_DAY_S:
                shutil.rmtree(left, ignore_errors=True)


class Publication:
    """A version in the making: put files into `path`, then `seal` it."""

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder = folder
        self.path = path

    def seal(self, manifest: Manifest, after: int | None = None) -> Path:
        """Hash the files, write the manifest, give the version its number and move it into place; returns its folder.

        `manifest.version` and `manifest.files` are filled in here. BundleError where the manifest is for another name,
        or where something is neither a file nor a folder. StoreError where something else has the version's name, and where
        version `after`, if that is told, is not the newest any more.
        """
        if manifest.name != self._folder.name:
            raise BundleError(MANIFEST_FILE, f"is for {manifest.name!r}, not for {self._folder.name!r}")
        files: dict[str, str] = {}
        for entry in sorted(self.path.rglob("*")):
            name = entry.relative_to(self.path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise BundleError(name, "is a link or a device; a bundle holds plain files")
            if entry.is_file() and name != MANIFEST_FILE:
                files[name] = _sha256_synced(entry)
        while True:
            newest = max(versions(self._folder.parent, self._folder.name), default=0)
            if after not in (None, newest):
                raise StoreError(
                    f"{manifest.name}/{newest} was published meanwhile, and what is new in it would be missing: run this "
                    f"again, or name {manifest.name}/{after} to start from that all the same"
                )
            version = newest + 1
            sealed = manifest.model_copy(update={"version": version, "files": files})
            target = self.path / MANIFEST_FILE
            target.write_bytes(sealed.sealed_bytes())
            _sha256_synced(target)
            for folder in (self.path, *(entry for entry in self.path.rglob("*") if entry.is_dir())):
                _sync_folder(folder)
            place = self._folder / str(version)
            try:
                self.path.rename(place)
            except OSError:
                if not place.is_dir():
                    if os.path.lexists(place):
                        raise StoreError(f"{place} is in the way, and is no version: move it elsewhere") from None
                    raise
                continue  # somebody else took this number meanwhile
            _sync_folder(self._folder)
            return place


def _sha256_synced(file: Path) -> str:
    with file.open("rb+") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
    return digest


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
