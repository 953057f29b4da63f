"""`twogate recalibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Store, store_folder
from cli.say import say_left_out, say_newer


def recalibrate(
    wanted: Annotated[str, typer.Argument(metavar="BUNDLE", help="NAME (its newest version) or NAME/VERSION.")],
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Clean images of the domain, in it and below.")],
    store: Store = None,
    allow_small: Annotated[
        bool, typer.Option("--allow-small", help="Take fewer images than the usual max_fpr of 0.01 needs, which is 99.")
    ] = False,
) -> None:
    """Calibrate a bundle on clean images of another domain, and publish that as a new version.

    - `twogate recalibrate photos --data scans/ --store bundles/`

    The graph and with it every embedding and score stay as they are; what changes is the table that p-values are read
    from, so that about max_fpr of the clean images of *this* domain are flagged. Bring images that are like those to come,
    that nobody attacked, and that the bundle was not trained on: 99 for a max_fpr of 0.01, 999 for 0.001. At most a
    tenth of the files may be no usable images: these are left out. A bundle that is calibrated to be quiet on honest
    changes (JPEG, noise, text and others) stays so: half of the images, 500 at most, are scored after each of them too,
    which takes several times as long; pictures smaller than the graph's input are changed before they are enlarged. The new
    version appears whole or not at all; its folder is printed.
    """
    from cli.bar import bar
    from model_store.bundle import load_bundle
    from model_store.calibration import images_for
    from model_store.recalibrate import USUAL_BUDGET
    from model_store.recalibrate import recalibrate as calibrate_anew
    from model_store.store import resolve
    from service.cores import usable_cores

    folder = store_folder(store)
    bundle = load_bundle(resolve(folder, wanted))
    with bar(f"scoring with {bundle.label}") as shown:
        done = calibrate_anew(
            bundle,
            folder,
            data,
            allow_small=allow_small,
            only_newest="/" not in wanted,
            threads=usable_cores(),
            begin=shown.begin,
            advance=shown.advance,
        )
    say_left_out(done.answers.skipped, done.copies)
    say_newer(bundle, done.place)
    smallest = done.calibration.smallest_budget
    typer.echo(f"calibrated on {done.calibration.n} clean images; the smallest max_fpr is {smallest:.2g}", err=True)
    for budget in (0.001, 0.01, 0.05):
        supported = "is supported" if budget >= smallest else f"needs {images_for(budget)} images"
        typer.echo(f"  max_fpr {budget:g} {supported}", err=True)
    if done.calibration.changes:
        changes, alone = ", ".join(done.calibration.changes), done.calibration.each_alone_from
        typer.echo(f"  twice that at most after each of {changes}", err=True)
        typer.echo(f"  (from {alone:.2g} on; below, after all of them together: bring more images for less)", err=True)
        typer.echo(f"  of the images themselves, unchanged, {done.quiet:.1%} are flagged at {USUAL_BUDGET:g}", err=True)
    typer.echo(done.place)
