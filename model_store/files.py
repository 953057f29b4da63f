"""Read a file of a bundle as what it must be: a plain file in the bundle's folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from model_store.errors import BundleError


def read_plain(root: Path, name: str) -> bytes:
    """Read a file named inside the bundle; links and names that lead out of it are refused."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise BundleError(name, "leads out of the bundle")
    current = root
    for part in pure.parts:
        current = current / part
        if current.is_symlink():
            raise BundleError(name, "is a link; a bundle holds plain files")
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(current, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise BundleError(name, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(name, "is no plain file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise BundleError(name, f"cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
