"""Options that several commands share, and where their defaults come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
