"""`twogate probe photographs` and `twogate probe blackbox`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs
from cli.options import Store, bundle_folder, task_folder, whole_number
from cli.say import going_on_later

app = typer.Typer(
    rich_markup_mode="markdown", no_args_is_help=True, help="Attack a running service from outside, as its clients reach it."
)

_Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="NAME, NAME/VERSION or a bundle's folder: the one that the service serves.")
]
_Url = Annotated[str, typer.Option(help="The running service. It gets many requests: take one of your own.")]
_Out = Annotated[Path, typer.Option(file_okay=False, help="Folder of records and page.")]
_Epsilon = Annotated[float, typer.Option(min=1, max=64, help="L-infinity budget in 1/255.")]
_Size = Annotated[str, typer.Option(help="smoke, small or full: how many steps and images.")]
_Seed = Annotated[int, typer.Option(min=0)]
_Device = Annotated[str, typer.Option(help="Of the attacker: cpu, cuda or cuda:N.")]
_LOCAL = "http://127.0.0.1:8000"


@app.callback()
def probe() -> None:
    """Attack a running service from outside, as its clients reach it. For measuring a service of your own."""


@app.command()
def photographs(
    bundle: _Bundle,
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Clean photographs of any size; no classes.")],
    url: _Url = _LOCAL,
    out: _Out = Path("probe"),
    sides: Annotated[
        str, typer.Option(help="Sizes: the longer side in pixels, comma-separated. Small photographs are enlarged.")
    ] = "640,1280,2560,4000",
    epsilon: _Epsilon = 8.0,
    size: _Size = "small",
    seed: _Seed = 0,
    store: Store = None,
    device: _Device = "cpu",
) -> None:
    """Attack photographs of real sizes on the bundle's public victim, store them as PNG and JPEG, and post them.

    - `twogate probe photographs photos --images pictures/ --out probe/`

    - `TWOGATE_MAX_IMAGE_BYTES=50000000 TWOGATE_MAX_BODY_BYTES=60000000 twogate serve`: before it, for large PNG files

    Two attackers: one works at the model's input size and enlarges his perturbation, one knows how the service resizes.
    Measured for each size and format (PNG, JPEG at quality 95, 85, 75): how many are flagged, clean ones too, and whether the
    attack is still one after storing and resizing. Stop it when you like: the same command goes on where it stopped. The
    page's path is printed.
    """
    with needs("harden"):
        from hardening.measure.probe import probe_photographs
    with going_on_later():
        page = probe_photographs(
            bundle_folder(bundle, store),
            url,
            images,
            out,
            sides=[whole_number(text) for text in sides.split(",")],
            epsilon=epsilon,
            size=size,
            seed=seed,
            device=device,
            command=["twogate", *sys.argv[1:]],
        )
    typer.echo(page)


@app.command()
def blackbox(
    bundle: _Bundle,
    task: Annotated[str, typer.Option(help="NAME=DIR with `train/<class>/*` and `test/<class>/*`.")],
    url: _Url = _LOCAL,
    out: _Out = Path("probe"),
    searches: Annotated[str, typer.Option(help="square, nes; comma-separated.")] = "square,nes",
    queries: Annotated[
        int, typer.Option(min=2, help="Pictures posted for each image at most; published attacks take up to 10000.")
    ] = 300,
    epsilon: _Epsilon = 8.0,
    size: _Size = "small",
    seed: _Seed = 0,
    store: Store = None,
    device: _Device = "cpu",
) -> None:
    """Attack by asking: nothing is known but the embeddings and scores that the service returns.

    - `twogate probe blackbox photos --task flowers=flowers/ --queries 300 --out probe/`

    The attacker posts labelled pictures of his own, fits a head to the embeddings that come back, and follows its margin
    while the verdict stays above 5 %. He has won when the guarded heads of the task, fitted here on clean images, are
    wrong. For each search the service answers up to --queries pictures for each of 16, 100 or 1000 images (--size). Stop it
    when you like: a search that is done is not done again. The page's path is printed.
    """
    with needs("harden"):
        from hardening.measure.probe import probe_blackbox
    name, root = task_folder(task)
    with going_on_later():
        page = probe_blackbox(
            bundle_folder(bundle, store),
            url,
            name,
            root,
            out,
            searches=searches.split(","),
            queries=queries,
            epsilon=epsilon,
            size=size,
            seed=seed,
            device=device,
            command=["twogate", *sys.argv[1:]],
        )
    typer.echo(page)
