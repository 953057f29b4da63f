"""`twogate probe`: a running service, attacked from outside; records, and one page from the records alone."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from hardening import provenance
from hardening.files import write_atomically
from hardening.measure import photographs, querying
from hardening.measure.live import LiveService
from hardening.measure.oblivious import check_budget
from hardening.measure.photographs import find_photographs, measure_photographs
from hardening.measure.querying import SEARCHES, measure_querying
from hardening.measure.records import Origin, Record, read
from hardening.measure.sizes import SIZES
from hardening.process import check_device, prepare_process
from hardening.progress import Bars
from model_store.bundle import Bundle, load_bundle
from model_store.errors import TwogateError
from model_store.folder import name_of

_PHOTOGRAPHS, _BLACKBOX = "photographs", "blackbox"
_SECTIONS = {
    _PHOTOGRAPHS: ("Photographs through a running service", photographs.READING, photographs.render_photographs),
    _BLACKBOX: ("A black box with scores", querying.READING, querying.render_querying),
}


def probe_photographs(
    place: Path,
    url: str,
    root: Path,
    out: Path,
    *,
    sides: Sequence[int],
    epsilon: float = 8.0,
    size: str = "small",
    seed: int = 0,
    device: str = "cpu",
    command: Sequence[str] = (),
    bars: Bars | None = None,
) -> Path:
    """Attack the photographs below `root` at several sizes (longer side, pixels), and post them to the service at `url`.

    Returns the page. Cells that are on disk are not measured again.
    """
    if not sides or min(sides) < 8:
        raise TwogateError("a photograph has at least 8 pixels on its longer side")
    check_budget(epsilon)
    files = "".join(f"{path.relative_to(root)} {path.stat().st_size}\n" for path in find_photographs(root))
    # Another folder of the same name is another one.
    pictures = f"{name_of(root)}-{hashlib.sha256(os.fsencode(files)).hexdigest()[:8]}"

    def run(bundle: Bundle, service: LiveService, folder: Path, origin: Origin, shown: Bars) -> None:
        measure_photographs(
            bundle,
            service,
            root,
            folder / pictures,
            origin,
            sides=sides,
            epsilon=epsilon,
            steps=SIZES[size].pgd_steps,
            seed=seed,
            device=device,
            bars=shown,
        )

    return _probe(_PHOTOGRAPHS, place, url, out, size, device, command, bars, run)


def probe_blackbox(
    place: Path,
    url: str,
    name: str,
    root: Path,
    out: Path,
    *,
    searches: Sequence[str] = tuple(SEARCHES),
    queries: int = 300,
    epsilon: float = 8.0,
    size: str = "small",
    seed: int = 0,
    device: str = "cpu",
    command: Sequence[str] = (),
    bars: Bars | None = None,
) -> Path:
    """Attack images of the task `name` in `root` (train/<class>/*, test/<class>/*) by queries to the service at `url`.

    Returns the page. Cells that are on disk are not measured again.
    """
    unknown = [search for search in searches if search not in SEARCHES]
    if unknown:
        raise TwogateError(f"there is no search {unknown[0]!r}; there are {', '.join(SEARCHES)}")
    check_budget(epsilon)

    def run(bundle: Bundle, service: LiveService, folder: Path, origin: Origin, shown: Bars) -> None:
        measure_querying(
            bundle,
            service,
            name,
            root,
            out,
            folder / name,
            origin,
            searches=searches,
            queries=queries,
            epsilon=epsilon,
            size=size,
            seed=seed,
            device=device,
            bars=shown,
        )

    return _probe(_BLACKBOX, place, url, out, size, device, command, bars, run)


def write_page(out: Path) -> Path:
    """Render the records below `out` into `out/probe.md`, and return its path."""
    parts = ["# A running service, probed"]
    for kind, (title, reading, render) in _SECTIONS.items():
        by_bundle: dict[str, list[Record]] = {}
        for record in read(out / kind):
            by_bundle.setdefault(f"{record.bundle}, digest {record.digest[:12]}, size {record.size}", []).append(record)
        if by_bundle:
            parts += [f"## {title}", reading]
        for bundle, records in by_bundle.items():
            made = sorted({f"`{r.command}` (commit {r.commit})" for r in records})
            parts += [f"### {bundle}", render(records), "Made by " + "; ".join(made) + "."]
    page = out / "probe.md"
    write_atomically(page, ("\n\n".join(parts) + "\n").encode())
    return page


def _probe(
    kind: str,
    place: Path,
    url: str,
    out: Path,
    size: str,
    device: str,
    command: Sequence[str],
    bars: Bars | None,
    run: Callable[[Bundle, LiveService, Path, Origin, Bars], None],
) -> Path:
    if size not in SIZES:
        raise TwogateError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
    check_device(device)
    prepare_process()
    bundle = load_bundle(place)
    service = LiveService(url, bundle)
    digest = bundle.manifest.digest
    origin = Origin(bundle.label, digest, size, shlex.join(command), provenance.commit())
    # The digest: a bundle that was made again under the same name is another one. The size: so are other steps and images.
    folder = out / kind / f"{bundle.label.replace('/', '-')}-{digest[:12]}-{size}"
    with bars or Bars() as shown:
        run(bundle, service, folder, origin, shown)
    return write_page(out)
