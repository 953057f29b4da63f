"""`twogate harden`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs
from cli.say import going_on_later


def harden(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The recipe, one YAML file.")],
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Images: `train/<class>/*` and `test/<class>/*`, or flat unlabelled folders."
        ),
    ],
    store: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of bundles that gets the new version; made if absent.")
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of this run; the same folder again goes on where it stopped.",
            show_default="runs/NAME, the recipe's name",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Harden a public encoder on your images, and put the result into a store as a new version.

    - `twogate harden recipes/smoke.yaml --data images/ --store bundles/`

    - `twogate serve --store bundles/ --bundle smoke`

    This takes minutes to hours. Stop it when you like: the same command goes on where it stopped. The bundle
    appears in the store whole, at the end, or not at all; its folder is printed.
    """
    with needs("harden"):
        from hardening.pipeline import harden as harden_recipe
    with going_on_later():
        bundle = harden_recipe(recipe, data, store, run, device)
    typer.echo(bundle)
