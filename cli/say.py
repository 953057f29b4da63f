"""What several commands say on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from model_store.bundle import Bundle


class Terminated(SystemExit):
    """SIGTERM came."""

    def __init__(self) -> None:
        super().__init__(143)


def say_left_out(skipped: Iterable[tuple[Path, str]], copies: int) -> None:
    """Which files of a folder were no images, and how many were copies of others."""
    for path, reason in skipped:
        typer.echo(f"skipped {path}: {reason}", err=True)
    if copies:
        typer.echo(f"left out {copies} files that are copies of others", err=True)


def say_newer(bundle: Bundle, place: Path) -> None:
    """Where the version in `place` was not made from the newest one, say what it lacks."""
    newest = int(place.name) - 1
    if newest > bundle.manifest.version:
        name = bundle.manifest.name
        typer.echo(
            f"note: made from {bundle.label}, though there is {name}/{newest}, whose tasks and calibration are not in it",
            err=True,
        )


@contextmanager
def going_on_later() -> Iterator[None]:
    """Around long work: who stops it, by Ctrl-C (exit code 130) or SIGTERM (143), is told that it is not lost."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        typer.echo("twogate: stopped; the same command goes on where it stopped", err=True)
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
