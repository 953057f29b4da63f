"""Optional parts of the installation: say what to install instead of showing a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from model_store.errors import TwogateError

_OURS = ("cli", "hardening", "model_store", "service")


class MissingExtra(TwogateError):
    """A command needs packages that this installation was made without."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import inside this block; a missing third-party package raises MissingExtra, which names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _OURS:
            raise
        raise MissingExtra(
            f"this needs {package}, which is not installed; install twogate[{extra}], "
            f"in a checkout: pip install -e '.[{extra}]'"
        ) from None
