"""Load and verify a bundle. A bundle is either exactly what its manifest says, or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TypeVar

import numpy as np

from model_store.errors import BundleError
from model_store.files import read_plain
from model_store.graph import check_self_contained
from model_store.manifest import MANIFEST_FILE, MODEL_FILE, Manifest, read_manifest
from model_store.session import GateSession
from model_store.tasks import TaskHead, check_head

_T = TypeVar("_T")
SIGNATURE_FILE = "model.sig"
GOLDEN_TOLERANCE = 1e-3
"""Largest difference from the golden answers that another processor may show; a wrong graph is off by far more."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files all had the manifest's hashes when they were read.

    `model` and `heads` (task -> its head's graph) hold those very bytes.
    """

    path: Path
    manifest: Manifest
    model: bytes
    model_sha256: str
    heads: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """name/version, as people write it."""
        return f"{self.manifest.name}/{self.manifest.version}"


def _naming(read: Callable[[Path], _T]) -> Callable[[Path], _T]:
    """Where a bundle is refused, say which: of a store's folders the last two are name and version."""

    @wraps(read)
    def named(path: Path) -> _T:
        try:
            return read(path)
        except BundleError as error:
            raise BundleError(error.file, error.reason, str(Path(*path.parts[-2:]))) from error

    return named


@_naming
def load_bundle(path: Path) -> Bundle:
    """Read a bundle's folder: manifest, then every file that it names, each checked against its sha256.

    The graphs' bytes are read once and kept, so that what was hashed is what will run. BundleError names the first
    file that is missing, linked, changed or outside the folder, or the graph that is not self-contained.
    """
    manifest = read_manifest(path)
    if MODEL_FILE not in manifest.files:
        raise BundleError(MANIFEST_FILE, f"names no {MODEL_FILE}")
    if sum(branch.embedding_dim for branch in manifest.branches) != manifest.embedding_dim:
        raise BundleError(MANIFEST_FILE, "the branches' dimensions do not add up to embedding_dim")
    for task in manifest.tasks:
        if task.file not in manifest.files:
            raise BundleError(MANIFEST_FILE, f"names no {task.file}, the head of task {task.name!r}")
    graphs = {MODEL_FILE: b""} | {task.file: b"" for task in manifest.tasks}
    for name in manifest.files:
        data = read_sealed(path, manifest, name)
        if name in graphs:
            graphs[name] = data
    for name, graph in graphs.items():
        check_self_contained(graph, name)
    heads = {task.name: graphs[task.file] for task in manifest.tasks}
    return Bundle(path, manifest, graphs[MODEL_FILE], manifest.files[MODEL_FILE], heads)


def read_sealed(path: Path, manifest: Manifest, name: str) -> bytes:
    """A file that the manifest names; BundleError unless it is a plain file with the manifest's sha256."""
    data = read_plain(path, name)
    if hashlib.sha256(data).hexdigest() != manifest.files[name]:
        raise BundleError(name, "its sha256 is not the one in the manifest: it was changed after it was written")
    return data


@_naming
def verify_bundle(path: Path) -> list[str]:
    """Check everything that can be checked, and return what was, in words; BundleError at the first failure.

    Schema and digest of the manifest, sha256 of every file, no file that the manifest does not name, the graph's
    signature, the golden vector, and what each task head answers for it.
    """
    bundle = load_bundle(path)
    manifest = bundle.manifest
    done = [
        f"manifest: schema {manifest.schema_version}, digest",
        f"sha256 of {len(manifest.files)} files",
        "graph: self-contained, standard operators only",
    ]
    known = {MANIFEST_FILE, SIGNATURE_FILE, *manifest.files}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if (file.is_symlink() or not file.is_dir()) and name not in known:
            raise BundleError(name, "the manifest does not name this file")
    session = GateSession(bundle)
    done.append("graph: inputs and outputs as promised")
    check_golden(session, manifest)
    done.append(f"golden vector: {manifest.golden.shape[0]} images answered within {GOLDEN_TOLERANCE:g}")
    for task in manifest.tasks:
        check_head(TaskHead(manifest, task, bundle.heads[task.name]), manifest)
        done.append(f"task {task.name}: inputs and outputs as promised, probabilities of {len(task.classes)} classes")
    return done


def check_golden(session: GateSession, manifest: Manifest) -> None:
    """Raise BundleError unless the graph answers the golden images as it did when the bundle was made."""
    try:
        images, embedding, confidence, score = manifest.golden.arrays()
    except ValueError as error:
        raise BundleError(MANIFEST_FILE, f"the golden vector cannot be read ({error})") from None
    rule = manifest.pixels
    if len(images) < 1 or images.shape[1:] != (rule.height, rule.width, 3):
        raise BundleError(MANIFEST_FILE, f"the golden images have shape {images.shape}, which the graph does not take")
    try:
        answer = session.run(images)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise BundleError(MODEL_FILE, f"cannot answer the golden vector ({type(error).__name__})") from error
    for what, expected, found in (
        ("embedding", embedding, answer.embedding),
        ("confidence", confidence, answer.confidence),
        ("score", score, answer.score),
    ):
        if expected.shape != found.shape:
            raise BundleError(MODEL_FILE, f"golden {what}: shape {found.shape}, promised {expected.shape}")
        worst = float(np.abs(expected - found).max())
        scale = max(1.0, float(np.abs(expected).max()))
        if not worst <= GOLDEN_TOLERANCE * scale:
            raise BundleError(MODEL_FILE, f"golden {what}: differs by {worst:.2g} from what the manifest promises")
