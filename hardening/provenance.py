"""Which code it was."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this code, with `+` behind it where the tree has changes; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:

        def git(*arguments: str) -> str:
            return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

        # Installed in an environment below somebody's own repository, this is no file of that repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
