"""Options that several commands share, where their defaults come from, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model_store.errors import TwogateError

Store = Annotated[
    Path | None,
    typer.Option(
        envvar="TWOGATE_STORE",
        help="Folder of bundles, `<store>/<name>/<version>/`.",
        show_default="the store that comes with Twogate",
        file_okay=False,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Size = Annotated[str, typer.Option(help="smoke (a minute), small (two cores), full (an accelerator).")]


def store_folder(store: Path | None) -> Path:
    """The store that was named, or the one that comes with Twogate; TwogateError where there is none."""
    from model_store.store import EMBEDDED_STORE

    folder = store or EMBEDDED_STORE
    if not folder.is_dir():
        raise TwogateError(f"there is no store {folder}")
    return folder


def bundle_folder(wanted: str, store: Path | None) -> Path:
    """The folder of a bundle: of NAME or NAME/VERSION in the store, or the one whose path was given.

    What begins with `.`, `/` or `~`, or has two slashes, is a path. Anything else is one only where it has a manifest and no
    store was named: with --store or TWOGATE_STORE that store's bundle is meant, whatever lies where the command is run.
    """
    from model_store.manifest import MANIFEST_FILE
    from model_store.store import resolve

    path = Path(wanted).expanduser()
    if wanted.startswith((".", "/", "~")) or wanted.count("/") > 1:
        return path
    if store is None and (path / MANIFEST_FILE).is_file():
        return path
    return resolve(store_folder(store), wanted)


def task_folder(text: str) -> tuple[str, Path]:
    """A task's name and folder, of NAME=DIR."""
    name, equals, folder = text.partition("=")
    if not equals or not name or not Path(folder).is_dir():
        raise TwogateError(f"--task {text}: write NAME=DIR, with a folder that exists")
    return name, Path(folder)


def whole_number(text: str) -> int:
    """TwogateError where the text is no whole number."""
    try:
        return int(text)
    except ValueError:
        raise TwogateError(f"{text!r} is no whole number") from None
