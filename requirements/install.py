"""Make or mend a virtual environment with exactly what a requirements file pins, and this checkout on top.

    python3 requirements/install.py VENV requirements/serve.txt

Needs Python 3.11 or newer and nothing else. Every download is checked against its hash. The record of what was
installed is written last, so an install that was interrupted is done again, and one that is complete costs a moment.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older one runs this file, to be told so
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"twogate: {sys.executable} is Python {found}, but 3.11 or newer is needed: make PYTHON=python3.12 ...")

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = "twogate-installed"


def main(venv: Path, requirements: Path) -> None:
    """Bring `venv` to what `requirements` says, if it is not there already."""
    interpreter = venv / "bin" / "python"
    record = venv / RECORD
    # The checkout is part of it: the environment imports Twogate from there.
    parts = (requirements.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), bytes(ROOT))
    wanted = hashlib.sha256(b"\0".join(parts)).hexdigest()
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second install waits, and then finds nothing to do
        if interpreter.exists() and record.is_file() and record.read_text() == wanted:
            return
        print(f"twogate: installing {requirements.name} into {venv}; only the first time takes minutes", flush=True)
        record.unlink(missing_ok=True)
        if not interpreter.exists() and (venv / "pyvenv.cfg").is_file():
            shutil.rmtree(venv)  # made by a Python that is gone
        run(sys.executable, "-m", "venv", venv)
        install(interpreter, requirements)
        record.write_text(wanted)


def install(interpreter: Path, requirements: Path) -> None:
    """First uv, by pip; then the rest by uv, which is many times faster; then Twogate itself, from this checkout."""
    pip = (interpreter, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet")
    with tempfile.TemporaryDirectory() as folder:
        only_uv = Path(folder) / "uv.txt"
        only_uv.write_text(pinned("uv", requirements.read_text()))
        run(*pip, "--require-hashes", "--no-deps", "-r", only_uv)
    uv = (interpreter.with_name("uv"), "pip", "install", "--python", interpreter)
    try:
        run(*uv, "--require-hashes", "-r", requirements)
    except subprocess.CalledProcessError:
        # pip may know a package mirror or a certificate that uv was not told of.
        print("twogate: uv could not install everything; trying pip, which is slower", flush=True)
        run(*pip, "--require-hashes", "-r", requirements)
    run(*uv, "--no-deps", "--no-build-isolation", "-e", ROOT)


def pinned(package: str, text: str) -> str:
    """The lines of a requirements file that pin one package, with their hashes."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(f"{package}==") or (lines and lines[-1].endswith("\\")):
            lines.append(line)
    return "\n".join(lines) + "\n"


def run(*command: object) -> None:
    """Run a command; its output is shown, its failure raised."""
    subprocess.run([str(part) for part in command], check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).expanduser(), Path(sys.argv[2]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"twogate: {error.cmd[0]} failed; the same command again goes on from here")
    except KeyboardInterrupt:
        sys.exit("twogate: stopped; the same command again goes on from here")
