"""From paths to answers without a server: find, read, decode in threads, judge in batches, in order."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_store.errors import ImageError, ImageTooLarge
from model_store.folder import MAX_FILE_BYTES
from service.engine.local import LocalGate
from service.engine.verdict import BrokenOutput, Judged


@dataclass(frozen=True)
class Row:
    """One image's answer, or why there is none."""

    path: str
    judged: Judged | None
    error: str | None


def find(paths: Iterable[Path], leave_out: Path | None = None) -> Iterator[Path | Row]:
    """The files that are meant: each file, and of each folder all files in it and below, sorted; hidden ones are not.

    Links to folders are not followed. What is found and cannot be read is a row: a link to nowhere, a pipe, which might
    never end, a folder that is closed to us. `leave_out` is one file, the output, that is never meant.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        closed: list[OSError] = []
        for place, below, files in os.walk(path, onerror=closed.append):
            yield from _closed(closed)
            below[:] = sorted(name for name in below if not name.startswith("."))
            for file in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
                if file != leave_out:
                    error = _no_file(file)
                    yield Row(_text(file), None, error) if error else file
        yield from _closed(closed)


def _closed(errors: list[OSError]) -> Iterator[Row]:
    """The folders that could not be read since this was asked last."""
    while errors:
        error = errors.pop(0)
        yield Row(_text(Path(error.filename)), None, _why(error))


def _no_file(path: Path) -> str | None:
    """Why what is found in a folder is not to be opened, if so."""
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "is no file"
    except OSError as error:
        return _why(error)


def _why(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def rows(gate: LocalGate, paths: Iterable[Path | Row], *, batch: int, threads: int) -> Iterator[Row]:
    """Judge the files, `batch` in one forward; as many rows as paths, in their order. What is a row already stays one.

    Reads no further ahead than two batches, so that any number of files fits into memory.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="twogate-decode") as pool:
        ahead: deque[tuple[str, Future[NDArray[np.uint8] | str]]] = deque()
        for path in paths:
            ahead.append((path.path if isinstance(path, Row) else _text(path), pool.submit(_picture, gate, path)))
            if len(ahead) >= 2 * batch:
                yield from _judge(gate, [ahead.popleft() for _ in range(batch)])
        while ahead:
            yield from _judge(gate, [ahead.popleft() for _ in range(min(batch, len(ahead)))])


def _picture(gate: LocalGate, path: Path | Row) -> NDArray[np.uint8] | str:
    """The decoded picture, or why there is none."""
    if isinstance(path, Row):
        return path.error or ""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ImageTooLarge("the file's size in bytes", MAX_FILE_BYTES, path.stat().st_size)
        return gate.decode(data)
    except OSError as error:
        return _why(error)
    except ImageError as error:
        return str(error)


def _judge(gate: LocalGate, batch: list[tuple[str, Future[NDArray[np.uint8] | str]]]) -> Iterator[Row]:
    decoded = [(path, waiting.result()) for path, waiting in batch]
    answers = iter(_answers(gate, [picture for _, picture in decoded if not isinstance(picture, str)]))
    for path, picture in decoded:
        answer = picture if isinstance(picture, str) else next(answers)
        if isinstance(answer, str):
            yield Row(path, None, answer)
        else:
            yield Row(path, answer, None)


def _answers(gate: LocalGate, pictures: list[NDArray[np.uint8]]) -> list[Judged | str]:
    """One answer a picture; one that breaks the graph's arithmetic hurts none of its neighbours."""
    try:
        return list(gate.judge(pictures))
    except BrokenOutput as error:
        if len(pictures) == 1:
            return [str(error)]
        return [answer for picture in pictures for answer in _answers(gate, [picture])]


def _text(path: Path) -> str:
    """The path as text, whatever bytes the name is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
