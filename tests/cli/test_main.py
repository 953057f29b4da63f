from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner

from cli.main import _Group, app
from tests.cli.conftest import Process, Twogate
from tests.conftest import REPOSITORY

COMMANDS = ["serve", "embed", "harden", "head", "recalibrate", "probe", "bundle"]


def test_version(twogate: Twogate) -> None:
    result = twogate("--version")
    assert result.exit_code == 0
    try:
        assert result.stdout == f"twogate {version('twogate')}\n"
    except PackageNotFoundError:
        assert "not installed" in result.stdout


def test_help_names_every_command_and_the_exit_codes(twogate: Twogate) -> None:
    result = twogate("--help")
    assert result.exit_code == 0
    for word in (*COMMANDS, "Exit codes", "130", "143"):
        assert word in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["embed"],
        ["harden"],
        ["head", "train"],
        ["probe", "photographs"],
        ["probe", "blackbox"],
        ["recalibrate"],
        ["bundle", "list"],
        ["bundle", "show"],
        ["bundle", "verify"],
        ["bundle", "diff"],
        ["bundle", "import"],
    ],
)
def test_every_command_has_help_that_teaches(twogate: Twogate, command: list[str]) -> None:
    result = twogate(*command, "--help")
    assert result.exit_code == 0
    if command != ["bundle", "list"]:
        assert f"twogate {' '.join(command)} " in result.stdout.split("Usage:")[1].partition("\n")[2], "no example"
    assert "[bold]" not in result.stdout


def every_command(group: TyperGroup, *names: str) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from every_command(command, *names, name)
        elif isinstance(command, TyperCommand):
            yield (*names, name), command


COMMAND_TREE = typer.main.get_command(app)
assert isinstance(COMMAND_TREE, TyperGroup)


@pytest.mark.parametrize(
    ("names", "command"), [pytest.param(*found, id=" ".join(found[0])) for found in every_command(COMMAND_TREE)]
)
def test_help_shows_what_stands_in_angle_brackets(twogate: Twogate, names: tuple[str, ...], command: TyperCommand) -> None:
    # Typer takes it for Markdown, where <class> is HTML and * emphasis, unless it is `code`.
    said = " ".join([command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)])
    shown = twogate(*names, "--help").stdout
    for word in re.findall(r"[\w/]*<[^ `]+", said):
        assert word in shown


def test_help_on_a_terminal_without_unicode(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for command in ([], ["recalibrate"], ["bundle"]):
        result = process(*command, "--help")
        assert (result.returncode, result.stderr) == (0, "")
        assert "Usage:" in result.stdout


def test_no_command_and_an_unknown_command_are_wrong_usage(twogate: Twogate) -> None:
    assert twogate().exit_code == 2
    result = twogate("sevre")
    assert result.exit_code == 2
    assert "serve" in result.stderr


def test_an_expected_error_is_one_line_and_no_traceback(process: Process) -> None:
    result = process("bundle", "show", "missing", "--store", ".")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "twogate: missing: there is no bundle of this name; the store holds nothing\n"


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after this code."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_help_imports_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "PIL", "onnxruntime", "pydantic", "fastapi", "pyarrow"}
    assert not heavy & loaded_after("import cli.main")


def test_serving_never_imports_the_training_side() -> None:
    loaded = loaded_after("import cli.main, service.server, service.app")
    assert not {"torch", "timm", "lightly", "sklearn", "pyarrow", "onnx"} & loaded
    assert not [name for name in loaded if name.startswith("hardening")]


def test_the_script_is_this_app() -> None:
    import tomllib

    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"twogate": "cli.main:app"}
    assert callable(app)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    group = typer.Typer(cls=_Group, pretty_exceptions_enable=False)

    @group.callback()
    def first() -> None:
        """So that commands have names."""

    @group.command()
    def write() -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    result = CliRunner().invoke(group, ["write"])
    assert result.exit_code == 1
    assert result.output == "twogate: No space left on device\n"
