"""Options that several commands share, and where their defaults come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from model_store.bundle import Bundle

Store = Annotated[
    Path | None,
    typer.Option(
        envvar="TWOGATE_STORE",
        help="Folder of bundles, `<store>/<name>/<version>/`.",
        show_default="the store that comes with Twogate",
        file_okay=False,
    ),
]


def store_folder(store: Path | None) -> Path:
    """The store that was named, or the one that comes with Twogate."""
    from model_store.store import EMBEDDED_STORE

    return store or EMBEDDED_STORE


def say_newer(bundle: Bundle, place: Path) -> None:
    """Where the version in `place` was not made from the newest one, say what it lacks."""
    newest = int(place.name) - 1
    if newest > bundle.manifest.version:
        name = bundle.manifest.name
        typer.echo(
            f"note: made from {bundle.label}, though there is {name}/{newest}, whose tasks and calibration are not in it",
            err=True,
        )
