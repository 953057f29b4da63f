"""Jobs for the tests of `hardening.workers`: functions that a worker process can import."""

from __future__ import annotations

import os
import time
from pathlib import Path

from hardening.progress import Bars
from model_store.errors import TwogateError


def write(path: Path, text: str, *, bars: Bars) -> None:
    """Say something, move a bar, and write."""
    bars.say(f"writing {text}")
    with bars.task(f"job {text}", 3) as task:
        for _ in range(3):
            task.advance(1, "on the way")
    path.write_text(f"{text} {os.getpid()}")


def refuse(reason: str, *, bars: Bars) -> None:
    """End as a stage does that knows what is wrong."""
    raise TwogateError(reason)


def crash(*, bars: Bars) -> None:
    """End as nobody wanted."""
    raise ZeroDivisionError("a mistake in the code")


def beat(path: Path, *, bars: Bars) -> None:
    """Write the time until killed."""
    while True:
        path.write_text(f"{os.getpid()} {time.monotonic()}")
        time.sleep(0.05)
