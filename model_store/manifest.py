"""The manifest: what a bundle says about itself, and the proof that nobody changed it since."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_store.calibration import Calibration, is_empty
from model_store.choices import Fusion
from model_store.errors import BundleError
from model_store.files import read_plain
from model_store.pixels import PixelRule

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
SCHEMA_VERSION: Final = 1
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_UNSEALED = "0" * 64
_NEWER = "made by a newer Twogate? Update this one"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Branch(_Part):
    """One column of `confidence`. An `mpae` or `bmp` branch is also a part of the embedding, in this order."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    role: Literal["mpae", "bmp", "tripwire", "sentinel"]
    description: str
    embedding_dim: int = Field(
        ge=0, description="columns of the embedding that this branch fills; 0 for a tripwire and a sentinel"
    )
    parts: tuple[int, ...] = Field(
        (),
        description="columns of each part of them: its features, then its early stages, then its layout; empty where all "
        "are its features",
    )

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        if self.parts and sum(self.parts) != self.embedding_dim:
            raise ValueError(f"the parts of {self.name} do not add up to its embedding_dim")
        return self


class Detector(_Part):
    """Which rule made `confidence` and `score`, and the numbers that it was fitted with, for people."""

    name: Literal["consistency", "sentinel", "paper"]
    description: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class Golden(_Part):
    """A few input tensors and what the graph must answer; raw little-endian arrays in base64."""

    shape: tuple[int, int, int, int]
    images: str
    embedding: str
    confidence: str
    score: str

    @classmethod
    def of(
        cls,
        images: NDArray[np.uint8],
        embedding: NDArray[np.float32],
        confidence: NDArray[np.float32],
        score: NDArray[np.float32],
    ) -> Golden:
        """Pack arrays [N,H,W,3], [N,D], [N,B], [N]."""

        def pack(array: NDArray[Any], dtype: str) -> str:
            return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")

        n, height, width, channels = images.shape
        return cls(
            shape=(n, height, width, channels),
            images=pack(images, "|u1"),
            embedding=pack(embedding, "<f4"),
            confidence=pack(confidence, "<f4"),
            score=pack(score, "<f4"),
        )

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Unpack what `of` packed; ValueError where the arrays and `shape` do not fit."""
        n = self.shape[0]

        def unpack(text: str) -> NDArray[np.float32]:
            return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").reshape(n, -1)

        images = np.frombuffer(base64.b64decode(self.images, validate=True), dtype=np.uint8).reshape(self.shape)
        (score,) = unpack(self.score).T
        return images, unpack(self.embedding), unpack(self.confidence), score


class Task(_Part):
    """A task head: a small graph that names one of `classes`, from the main graph's embedding and confidence."""

    name: str = Field(pattern=NAME_PATTERN)
    classes: tuple[str, ...] = Field(min_length=2, description="in the order of the head's probabilities")
    file: str = Field(description="tasks/<name>.onnx")
    fusion: Fusion = Field(
        description="how the branches vote: as far as each can be trusted on this image (guarded), or by certainty (rfdm)"
    )
    trained_on: str = Field(description="what the labelled images were, in words")
    metrics: dict[str, float] = Field(default_factory=dict, description="e.g. validation_clean_acc, a share")

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.file != task_file(self.name):
            raise ValueError(f"the file of task {self.name!r} must be {task_file(self.name)}")
        if "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("every class has a name of its own")
        return self


def task_file(name: str) -> str:
    """Where a bundle keeps the head of a task."""
    return f"tasks/{name}.onnx"


class Manifest(_Part):
    """`manifest.json`. Every other file of the bundle is named in `files` with its sha256."""

    schema_version: Literal[1] = SCHEMA_VERSION
    digest: str = Field(
        default=_UNSEALED,
        pattern=r"^[0-9a-f]{64}$",
        description="sha256 of this file's bytes with these 64 characters set to 0",
    )
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    created: datetime
    pixels: PixelRule
    embedding_dim: int = Field(ge=1)
    branches: tuple[Branch, ...] = Field(min_length=1)
    detector: Detector
    calibration: Calibration
    files: dict[str, str] = Field(description="path inside the bundle -> sha256, lower-case hex")
    golden: Golden
    provenance: dict[str, Any] = Field(description="recipe, data summary, seeds, library versions, commit")
    tasks: tuple[Task, ...] = Field(
        default=(), exclude_if=is_empty, description="the heads that the bundle carries; left out if there are none"
    )

    @model_validator(mode="after")
    def _one_head_a_task(self) -> Manifest:
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise ValueError("two tasks have the same name")
        return self

    def sealed_bytes(self) -> bytes:
        """The bytes of `manifest.json`, with `digest` filled in."""
        text = self.model_copy(update={"digest": _UNSEALED}).model_dump_json(indent=1)
        unsealed = text.encode("utf-8")
        digest = hashlib.sha256(unsealed).hexdigest()
        return unsealed.replace(_UNSEALED.encode(), digest.encode(), 1)


def parse_manifest(data: bytes) -> Manifest:
    """Read and check the bytes of a `manifest.json`. BundleError names what is wrong: schema, digest or a field."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(MANIFEST_FILE, f"is not JSON ({error})") from None
    version = raw.get("schema_version") if isinstance(raw, Mapping) else None
    if version != SCHEMA_VERSION:
        newer = f"; {_NEWER}" if isinstance(version, int) and version > SCHEMA_VERSION else ""
        raise BundleError(
            MANIFEST_FILE, f"schema version {version!r} is not the one this program reads ({SCHEMA_VERSION}){newer}"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        newer = f"; {_NEWER}" if first["type"] == "extra_forbidden" else ""
        raise BundleError(MANIFEST_FILE, f"field {where!r}: {first['msg']}{newer}") from None
    unsealed = data.replace(manifest.digest.encode(), _UNSEALED.encode(), 1)
    if hashlib.sha256(unsealed).hexdigest() != manifest.digest:
        raise BundleError(MANIFEST_FILE, "its digest does not match its content: it was changed after it was written")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a bundle's folder; raises as `parse_manifest` does."""
    return parse_manifest(read_plain(folder, MANIFEST_FILE))
