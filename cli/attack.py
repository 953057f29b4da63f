"""`twogate attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs
from cli.options import Device, Size, Store, bundle_folder


def attack(
    bundle: Annotated[str, typer.Argument(help="NAME, NAME/VERSION or a bundle's folder: whose public victim is attacked.")],
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Images: `train/<class>/*`, `test/<class>/*`, or flat.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder that gets the pictures, as PNG files.")],
    name: Annotated[
        str, typer.Option("--attack", help="pgd, targeted, uap, per, pat, pap-base, pap-fuse, pap-ugs, ssp, noise.")
    ] = "pgd",
    epsilon: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="L-infinity budget in 1/255, a whole number: pictures have 8 bits; a patch has none."
        ),
    ] = 10,
    images: Annotated[int, typer.Option(min=1, help="How many pictures, drawn with the seed.")] = 20,
    size: Size = "small",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    store: Store = None,
    device: Device = "cpu",
) -> None:
    """Attack pictures on a bundle's public victim, and write them as PNG files beside the clean ones, ready to be posted.

    - `twogate attack photos --data images/ --out attacked/ --attack pgd --epsilon 10`

    - `curl -F file=@attacked/0000-x-pgd.png http://127.0.0.1:8000/v1/scan`

    For measuring a defence that is yours. The attacked files are listed.
    """
    with needs("harden"):
        from hardening.measure.evaluate import attack as make
    place = bundle_folder(bundle, store)
    for file in make(place, data, out, name=name, epsilon=epsilon, images=images, size=size, seed=seed, device=device):
        typer.echo(file)
