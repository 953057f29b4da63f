"""`twogate head train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs
from cli.options import Store, store_folder
from cli.say import say_left_out, say_newer
from model_store.choices import Fusion

app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, help="Task heads: classifiers that a bundle carries.")


@app.callback()
def head() -> None:
    """Task heads: classifiers that a bundle carries, served at /v1/tasks/TASK/classify."""


@app.command()
def train(
    wanted: Annotated[str, typer.Argument(metavar="BUNDLE", help="NAME (its newest version) or NAME/VERSION.")],
    task: Annotated[str, typer.Option(help="The task's name, as it is served; a head of this name is replaced.")],
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Images: `train/<class>/*` or `<class>/*`; `test/<class>/*` gives a number only.",
        ),
    ],
    fusion: Annotated[
        Fusion, typer.Option(help="guarded: branches vote as far as each can be trusted; rfdm: by certainty (ZePAD).")
    ] = "guarded",
    seed: Annotated[int, typer.Option(min=0, help="Draws the 15% of the images that are held out.")] = 0,
    store: Store = None,
) -> None:
    """Train a classifier on a bundle's embeddings, and publish a new version that carries it.

    - `twogate head train photos --task flowers --data flowers/ --store bundles/`

    - `twogate serve --store bundles/ --bundle photos`, then POST an image to /v1/tasks/flowers/classify

    The graph and with it every embedding and verdict stay as they are. 15% of the images are held out and give the
    accuracy that is reported. The new version appears whole or not at all; its folder is printed.
    """
    from cli.bar import bar

    with needs("harden"):
        from hardening.heads import add_head
    from model_store.bundle import load_bundle
    from model_store.store import resolve
    from service.cores import usable_cores

    folder = store_folder(store)
    bundle = load_bundle(resolve(folder, wanted))
    with bar(f"embedding with {bundle.label}") as shown:
        trained = add_head(
            bundle,
            folder,
            task,
            data,
            fusion=fusion,
            seed=seed,
            only_newest="/" not in wanted,
            threads=usable_cores(),
            begin=shown.begin,
            advance=shown.advance,
        )
    say_left_out(trained.skipped, trained.copies)
    say_newer(bundle, trained.place)
    typer.echo(f"task {task}: {len(trained.task.classes)} classes, {fusion} fusion, {trained.task.trained_on}", err=True)
    for metric, value in trained.task.metrics.items():
        typer.echo(f"{metric}: {100 * value:.1f}%", err=True)
    if trained.seen:
        from hardening.heads import SEEN

        typer.echo(f"note: {SEEN}", err=True)
    typer.echo(trained.place)
