"""The command `twogate`. Commands import what they need inside: `serve` never sees torch, and `--help` is quick."""

from __future__ import annotations

import io
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import attack, bundle, embed, evaluate, harden, head, probe, recalibrate, serve
from cli.say import Terminated
from model_store.errors import TwogateError


class _Group(TyperGroup):
    """A group of commands whose expected errors are one line on stderr and exit code 1, never a traceback."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run as the program does."""
        # Frames, arrows and names of files: where the terminal lacks a character, a question mark is better than a traceback.
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")
        return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except TwogateError as error:
            typer.echo(f"twogate: {error}", err=True)
            raise typer.Exit(1) from None
        except OSError as error:
            # A folder that cannot be written, a full disk. Whoever closed a pipe wants no more words.
            if isinstance(error, BrokenPipeError):
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            typer.echo(f"twogate: {where}{error.strerror or error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="twogate",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("embed")(embed.embed)
app.command("harden")(harden.harden)
app.command("attack")(attack.attack)
app.command("evaluate")(evaluate.evaluate)
app.command("recalibrate")(recalibrate.recalibrate)
app.add_typer(probe.app, name="probe")
app.add_typer(head.app, name="head")
app.add_typer(bundle.app, name="bundle")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"twogate {version('twogate')}")
        except PackageNotFoundError:
            typer.echo("twogate, run from a checkout that is not installed")
        raise typer.Exit


def _terminated(*_: object) -> None:
    raise Terminated


@app.callback()
def twogate(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Image embeddings that survive attack, with a verdict on every image: is this one an adversarial example?

    - `twogate serve` answers on http://127.0.0.1:8000

    - `twogate embed photo.jpg` prints embedding and verdict of one image, no server needed

    - `twogate embed photos/` writes those of a whole folder into a Parquet file

    - `twogate harden recipe.yaml --data images/ --store bundles/` makes a bundle of your own

    - `twogate evaluate photos --task NAME=images/` measures a bundle under attack, and writes a report

    - `twogate probe photographs photos --images pictures/` attacks a running service with photographs of real sizes

    - `twogate head train photos --task NAME --data images/` gives a bundle a classifier of your own

    - `twogate recalibrate photos --data images/` fits its false alarms to another domain

    Exit codes: 0 it worked, 1 it did not (the reason is on stderr), 2 the command was not understood, 130 it was stopped by
    Ctrl-C, 143 by SIGTERM; `serve` finishes what is in flight, and leaves with 0.
    """
    # By itself SIGTERM runs no `finally`, and half-written files would stay. The server has its own way to stop.
    if ctx.invoked_subcommand != "serve":
        signal.signal(signal.SIGTERM, _terminated)
