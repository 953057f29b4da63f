"""A folder of pictures through a bundle's graph: find, decode in threads by the bundle's pixel rule, run in batches."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_store.errors import ImageError, TwogateError
from model_store.pixels import PixelRule, decode, decode_small
from model_store.session import GateOutputs, GateSession

MAX_FILE_BYTES = 100 * 2**20
"""A larger file is no photograph, and reading it would take its size in memory."""
MOST_SKIPPED = 0.1
"""A folder of which a larger share is no image is not the folder that was meant."""
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's control characters, surrogates (bytes that are no UTF-8), and separators of lines and paragraphs."""
_BATCH = 16
_Decode = Callable[[bytes, PixelRule], NDArray[np.uint8]]


class FolderError(TwogateError):
    """The folder does not hold the images that are needed."""


@dataclass(frozen=True)
class Answers:
    """What the graph answered for the images of a folder, one row an image, in the order of the files."""

    paths: tuple[Path, ...]
    embedding: NDArray[np.float32]
    """[N, D]; [N, 0] where embeddings were not asked for."""
    confidence: NDArray[np.float32]
    """[N, B]"""
    score: NDArray[np.float32]
    """[N]"""
    skipped: tuple[tuple[Path, str], ...]
    """(file, reason) of those that are no usable image."""
    files: tuple[str, ...]
    """sha256 of each file."""

    @property
    def digest(self) -> str:
        """sha256 over the sha256 of all files, in order."""
        return hashlib.sha256("".join(self.files).encode()).hexdigest()


def name_of(folder: Path) -> str:
    """A folder's name as text, whatever bytes it is made of."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace")


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and below, each level sorted; hidden ones are left out, links to folders not followed.

    None where there is no such folder; OSError where one below cannot be read, so that no part is silently missing.
    """
    if not folder.is_dir():
        return
    for place, below, files in os.walk(folder, onerror=_fail):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            file = Path(place, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _fail(error: OSError) -> None:
    raise error


def class_names(names: Iterable[str]) -> None:
    """FolderError where folders cannot be classes: a name that would break lines, or two that look the same."""
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        if any(unicodedata.category(character) in _NO_TEXT for character in name):
            raise FolderError(f"the folder {name!a} cannot be a class: its name has control characters or is no UTF-8")
        composed = unicodedata.normalize("NFC", name)
        if composed in seen:
            raise FolderError(
                f"the folders {seen[composed]!a} and {name!a} cannot be two classes: their names look the same, "
                "written in two ways; put their images into one"
            )
        seen[composed] = name


def answer_files(
    session: GateSession,
    rule: PixelRule,
    files: Sequence[Path],
    *,
    threads: int = 1,
    embeddings: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Answers:
    """Run the graph on image files, whatever their number: no more than two batches of pictures are held.

    `threads` decode; `advance` is called once a file. Files that are no usable image are skipped, and FolderError is
    raised where they are more than a tenth, or where the graph's answer is not finite.
    """
    kept: list[Path] = []
    rows: list[GateOutputs] = []
    skipped: list[tuple[Path, str]] = []
    digests: list[str] = []

    def run(waiting: list[tuple[Path, Future[tuple[str, NDArray[np.uint8] | str]]]]) -> None:
        pictures = []
        for path, future in waiting:
            digest, picture = future.result()
            if isinstance(picture, str):
                skipped.append((path, picture))
            else:
                kept.append(path)
                pictures.append(picture)
                digests.append(digest)
        if pictures:
            out = session.run(np.stack(pictures))
            for values in (out.embedding, out.confidence, out.score):
                broken = ~np.isfinite(values).reshape(len(pictures), -1).all(axis=1)
                if broken.any():
                    path = kept[len(kept) - len(pictures) + int(broken.argmax())]
                    raise FolderError(f"{path}: the graph's answer for this image is not finite")
            embedding = out.embedding if embeddings else out.embedding[:, :0].copy()
            rows.append(GateOutputs(embedding, out.confidence, out.score))
        for _ in waiting:
            advance()

    with ThreadPoolExecutor(threads, thread_name_prefix="twogate-decode") as pool:
        ahead: deque[tuple[Path, Future[tuple[str, NDArray[np.uint8] | str]]]] = deque()
        try:
            for path in files:
                ahead.append((path, pool.submit(_picture, path, rule)))
                if len(ahead) >= 2 * _BATCH:
                    run([ahead.popleft() for _ in range(_BATCH)])
            while ahead:
                run([ahead.popleft() for _ in range(min(_BATCH, len(ahead)))])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if len(skipped) > MOST_SKIPPED * len(files):
        path, reason = skipped[0]
        raise FolderError(
            f"{len(skipped)} of {len(files)} files are no usable images, and at most a tenth may be; the first is "
            f"{path}: {reason}"
        )
    if not rows:
        raise FolderError("there is no image in the folder")
    return Answers(
        tuple(kept),
        np.concatenate([row.embedding for row in rows]),
        np.concatenate([row.confidence for row in rows]),
        np.concatenate([row.score for row in rows]),
        tuple(skipped),
        tuple(digests),
    )


def read_small(pool: ThreadPoolExecutor, files: Sequence[Path], rule: PixelRule) -> list[NDArray[np.uint8]]:
    """`decode_small` of files that were answered before; FolderError where one is no image any more."""
    pictures = []
    for path, (_, picture) in zip(files, pool.map(lambda file: _picture(file, rule, decode_small), files), strict=True):
        if isinstance(picture, str):
            raise FolderError(f"{path} has changed meanwhile: {picture}")
        pictures.append(picture)
    return pictures


def _picture(path: Path, rule: PixelRule, decode: _Decode = decode) -> tuple[str, NDArray[np.uint8] | str]:
    """sha256 of the file and the decoded picture, or why there is none."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return "", f"the file has more than {MAX_FILE_BYTES} bytes"
        data = path.read_bytes()
        return hashlib.sha256(data).hexdigest(), decode(data, rule)
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    except ImageError as error:
        return "", str(error)
