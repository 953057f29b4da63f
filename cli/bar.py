"""A progress bar on stderr for work of known length; none where that is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """One bar. `begin` sets its length, `advance` moves it on by one."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task("", total=None)

    def begin(self, total: int) -> None:
        """There are `total` steps."""
        self.progress.update(self._task, total=total)

    def advance(self) -> None:
        """One is done."""
        self.progress.advance(self._task)


@contextmanager
def bar(description: str) -> Iterator[Bar]:
    """A bar that disappears at the end."""
    shown = Bar()
    shown.progress.update(shown.progress.task_ids[0], description=description)
    with shown.progress:
        yield shown
