"""`twogate embed`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.extras import needs
from cli.options import Store, bundle_folder
from model_store.errors import TwogateError

if TYPE_CHECKING:
    from cli.rows import Row

STDOUT = Path("-")


def embed(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Images, or folders of images.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Parquet file to write; - prints JSON lines.",
            show_default="for files -, for a folder FOLDER.parquet here",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output file if there is one.")] = False,
    bundle: Annotated[
        str | None,
        typer.Option(
            envvar="TWOGATE_BUNDLE",
            help="NAME (its newest version), NAME/VERSION, or the path of a bundle.",
            show_default="photos",
        ),
    ] = None,
    store: Store = None,
    max_fpr: Annotated[
        float, typer.Option(envvar="TWOGATE_MAX_FPR", help="Share of clean images that may be flagged, 0 to 1.")
    ] = 0.01,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Images in one forward.")] = 16,
) -> None:
    """Embed and judge images without a server.

    - `twogate embed photo.jpg | jq .flagged`: one JSON line an image

    - `twogate embed photos/`: all of a folder and below, into photos.parquet

    - `twogate embed a/ b/ -o both.parquet`

    An image that cannot be read is a row with an error and no answer; it stops nothing. Of a folder, every file is
    a row, except hidden ones, and so is a folder that cannot be read. The columns are path, embedding, p_value, score,
    flagged, error.

    Exit codes: 0 at least one image was answered, 1 none was, 2 the command was not understood.
    """
    if output is None:
        output = _default_output(paths)
    if output != STDOUT:
        _check(output, overwrite)
        with needs("batch"):
            from cli.table import writing
    from cli.bar import bar
    from cli.rows import find, rows
    from model_store.bundle import load_bundle
    from model_store.store import DEFAULT_BUNDLE
    from service.engine.local import LocalGate

    gate = LocalGate(load_bundle(bundle_folder(bundle or DEFAULT_BUNDLE, store)), max_fpr)
    total = sum(1 for _ in find(paths, output))
    if not total:
        raise TwogateError(f"there are no files in {', '.join(map(str, paths))}; hidden ones are left out")
    counts = {"answered": 0, "flagged": 0, "broken": 0}
    with ExitStack() as stack:
        put: Callable[[Row], None] = _print if output == STDOUT else stack.enter_context(writing(output, gate)).append
        shown = stack.enter_context(bar(f"embedding with {gate.label}"))
        shown.begin(total)
        for row in rows(gate, _said(find(paths, output)), batch=batch, threads=gate.threads):
            put(row)
            counts["broken" if row.judged is None else "answered"] += 1
            counts["flagged"] += row.judged is not None and row.judged.verdict.flagged
            shown.advance()
    if output != STDOUT:
        answered, flagged, broken = counts["answered"], counts["flagged"], counts["broken"]
        said = f"{output}: {answered} images answered, {flagged} of them flagged; {broken} without an answer"
        typer.echo(said, err=True)
    if not counts["answered"]:
        raise typer.Exit(1)


def _said(found: Iterable[Path | Row]) -> Iterator[Path | Row]:
    """What cannot be read at all is a line on stderr beside its row: it may be a whole folder."""
    for one in found:
        if not isinstance(one, Path):
            typer.echo(f"twogate: {one.path}: {one.error}", err=True)
        yield one


def _default_output(paths: list[Path]) -> Path:
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        return STDOUT
    name = folders[0].resolve().name if len(paths) == 1 else ""
    return Path(f"{name or 'embeddings'}.parquet")


def _check(output: Path, overwrite: bool) -> None:
    """Refuse an output that could not be written, before an hour of work and not after."""
    if output.suffix != ".parquet":
        raise typer.BadParameter(f"{output} must end in .parquet", param_hint="--output")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder", param_hint="--output")
    if output.exists() and not overwrite:
        raise typer.BadParameter(f"{output} exists; --overwrite replaces it", param_hint="--output")


def _print(row: Row) -> None:
    """One JSON line; a float32 needs nine digits to be read back exactly."""
    judged = row.judged
    # Flagged where it is no finite number, which JSON does not have.
    score = None if judged is None or not isfinite(judged.verdict.score) else float(f"{judged.verdict.score:.9g}")
    line = {
        "path": row.path,
        "embedding": None if judged is None else [float(f"{value:.9g}") for value in judged.embedding.tolist()],
        "p_value": None if judged is None else judged.verdict.p_value,
        "score": score,
        "flagged": None if judged is None else judged.verdict.flagged,
        "error": row.error,
    }
    typer.echo(json.dumps(line))
