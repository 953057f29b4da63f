"""`twogate bundle list|show|verify|diff|import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Store, bundle_folder, store_folder

if TYPE_CHECKING:
    from model_store.manifest import Manifest

app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, help="Look at the bundles in a store, and check them.")

Wanted = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="NAME (its newest version), NAME/VERSION, or the path of a bundle.")
]


@app.command("list")
def list_(store: Store = None) -> None:
    """List the bundles of a store, one line a version."""
    from rich.console import Console
    from rich.table import Table

    from model_store.errors import BundleError
    from model_store.manifest import read_manifest
    from model_store.store import names, resolve, versions

    folder = store_folder(store)
    table = Table("bundle", "version", "created", "dim", "detector", "size", box=None, pad_edge=False)
    damaged = False
    for name in names(folder):
        for version in versions(folder, name):
            try:
                path = resolve(folder, f"{name}/{version}")
                manifest = read_manifest(path)
            except BundleError as error:
                damaged = True
                table.add_row(name, str(version), f"damaged: {error}")
                continue
            created = manifest.created.strftime("%Y-%m-%d %H:%M")
            dim, detector = str(manifest.embedding_dim), manifest.detector.name
            table.add_row(name, str(version), created, dim, detector, _size(path))
    if table.row_count:
        Console(soft_wrap=True, highlight=False, markup=False).print(table)
    else:
        typer.echo(f"there is no bundle in {folder}", err=True)
    if damaged:
        raise typer.Exit(1)


@app.command()
def show(
    wanted: Wanted,
    store: Store = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The manifest as JSON, without golden vector and calibration scores.")
    ] = False,
) -> None:
    """Say what a bundle is: its input, its branches, its detector, what false-positive rates it supports.

    - `twogate bundle show photos`

    - `twogate bundle show photos/1 --json | jq .provenance`
    """
    from model_store.manifest import read_manifest

    path = bundle_folder(wanted, store)
    manifest = read_manifest(path)
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2, exclude={"golden": True, "calibration": {"scores"}}))
    else:
        typer.echo(_summary(path, manifest))


@app.command()
def verify(wanted: Wanted, store: Store = None) -> None:
    """Check a bundle: schema, digest, the hash of every file, strangers, the graph, and what it answers.

    Exit code 1 with the file and the reason where a check fails.

    - `twogate bundle verify photos/1`
    """
    from model_store.bundle import verify_bundle
    from model_store.manifest import read_manifest

    path = bundle_folder(wanted, store)
    for check in verify_bundle(path):
        typer.echo(f"ok  {check}")
    manifest = read_manifest(path)
    typer.echo(f"{manifest.name}/{manifest.version} is sound")


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="NAME (its newest version), NAME/VERSION, or a path.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    store: Store = None,
) -> None:
    """Say in what two bundles differ: files, pixels, branches, detector, calibration, tasks.

    By their manifests, which have the hash of every file; whether the files are as the manifests say is for `verify`.

    - `twogate bundle diff photos/1 photos/2`
    """
    from rich.console import Console
    from rich.table import Table

    from model_store.differences import differences
    from model_store.manifest import read_manifest

    old, new = (read_manifest(bundle_folder(wanted, store)) for wanted in (before, after))
    labels = [f"{one.name}/{one.version}" for one in (old, new)]
    found = differences(old, new)
    if not found:
        typer.echo(f"{labels[0]} and {labels[1]} do not differ in what they answer")
        return
    table = Table("what", *labels, box=None, pad_edge=False)
    for difference in found:
        table.add_row(difference.what, difference.before, difference.after)
    Console(highlight=False, markup=False).print(table)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="A bundle's folder.")],
    store: Annotated[
        Path, typer.Option(envvar="TWOGATE_STORE", file_okay=False, help="Folder of bundles that gets it; made if absent.")
    ],
) -> None:
    """Verify a bundle of another store, and publish it in this one under its name and the next number.

    Every store counts its versions from 1, so two of them can have another NAME/2 each. Everything but the number stays, and
    the new manifest says where it came from. A signature (model.sig) belongs to the old number: sign the new one. The new
    version's folder is printed.

    - `twogate bundle import received/photos/2 --store bundles/`
    """
    from model_store.bundle import load_bundle, verify_bundle
    from model_store.revise import revise

    verify_bundle(path)
    bundle = load_bundle(path)
    card = f"## Imported\n\nIt was {bundle.label} elsewhere."
    typer.echo(revise(bundle, store, fields={}, card=card, record={"imported": True}))


def _size(path: Path) -> str:
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{total / 2**20:.1f} MiB" if total >= 2**20 else f"{total / 2**10:.0f} KiB"


def _summary(path: Path, manifest: Manifest) -> str:
    rule, calibration = manifest.pixels, manifest.calibration
    lines = [
        f"{manifest.name}/{manifest.version}, created {manifest.created:%Y-%m-%d %H:%M}, {_size(path)}",
        f"digest      {manifest.digest}",
        f"input       {rule.width} x {rule.height} pixels, {rule.resample}",
        f"embedding   {manifest.embedding_dim} numbers, unit length",
        "branches",
    ]
    for branch in manifest.branches:
        lines.append(f"  {branch.name:<12} {branch.role:<9} {branch.embedding_dim:>5}  {branch.description}")
    lines += [
        f"detector    {manifest.detector.name}: {manifest.detector.description}",
        f"calibrated  on {calibration.n} clean images ({calibration.words})",
        "  budget (max_fpr)  flags scores",
    ]
    for budget in (0.001, 0.01, 0.05):
        supported = budget >= calibration.smallest_budget
        threshold = f"above {calibration.threshold(budget):.4g}" if supported else "too few clean images"
        lines.append(f"  {budget:<17g} {threshold}")
    if manifest.tasks:
        lines.append("tasks")
    for task in manifest.tasks:
        metrics = "".join(f", {name} {100 * value:.1f}%" for name, value in task.metrics.items())
        lines.append(f"  {task.name:<12} {len(task.classes)} classes, {task.fusion}, {task.trained_on}{metrics}")
    lines.append("provenance")
    lines += [f"  {key}: {_short(value)}" for key, value in manifest.provenance.items()]
    return "\n".join(lines)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
