"""`twogate evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.extras import needs
from cli.options import Device, Size, Store, bundle_folder, task_folder, whole_number
from cli.say import going_on_later
from model_store.errors import TwogateError


def evaluate(
    bundles: Annotated[
        list[str] | None, typer.Argument(help="NAME, NAME/VERSION or a bundle's folder; several for a spread over seeds.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIR with `train/<class>/*` and `test/<class>/*`; once for each task. The first is the attacker's data "
            "too."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of records and report.")] = Path("evaluation"),
    size: Size = "small",
    attacks: Annotated[
        str, typer.Option(help="Made on the public victim; comma-separated, `none` for none.", show_default="all of them")
    ] = "all",
    adaptive: Annotated[
        str,
        typer.Option(
            help="Of the adaptive suite, by attackers who know the method; comma-separated, or `all`. Behind a name "
            "may stand the budget that it aims at instead of 0.05, and its steps: `T5-selective@fpr0.2@200`."
        ),
    ] = "none",
    convergence: Annotated[
        bool,
        typer.Option(
            "--convergence",
            help="Also make each attack, those of --adaptive too, with an eighth, a quarter and half of its steps.",
        ),
    ] = False,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Other detectors on the same attacked images, BEYOND among them.")
    ] = False,
    baselines: Annotated[
        str,
        typer.Option(
            help="Other defences beside the bundle: pgd-at, trades, mart, gen-af; comma-separated, or `all`. Each is trained "
            "from the public victim on the first task's images, by the budget of the bundle's recipe."
        ),
    ] = "none",
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="A bundle made by the same recipe with another seed: the grey-box attacker's own. Several, comma-separated, "
            "are attacked together."
        ),
    ] = None,
    epsilons: Annotated[str, typer.Option(help="L-infinity budgets in 1/255, whole numbers, comma-separated.")] = "8,10",
    seeds: Annotated[str, typer.Option(help="Of the attacks, comma-separated.")] = "0,1,2",
    workers: Annotated[int, typer.Option(min=1, help="Tasks side by side, one core each.")] = 1,
    store: Store = None,
    device: Device = "cpu",
) -> None:
    """Measure bundles under attack, and write a report (Markdown and HTML) from records that say how each number was made.

    - `twogate evaluate photos --task imagenette=images/ --out evaluation/`

    - `twogate evaluate mine/1 --task cifar10=cifar10/ --adaptive all --surrogate mine/2`

    - `twogate evaluate photos --task imagenette=images/ --out evaluation/ --baselines pgd-at,trades,mart,gen-af`

    - `twogate evaluate --out evaluation/`: the report again, from the records that are there

    Stop it when you like: the same command goes on where it stopped. The page's path is printed.
    """
    with needs("harden"):
        from hardening.measure import knowing, oblivious
        from hardening.measure.baselines import BASELINES
        from hardening.measure.evaluate import evaluate as measure
    with going_on_later():
        page = measure(
            [bundle_folder(wanted, store) for wanted in bundles or []],
            _pairs(task or []),
            out,
            surrogates=[bundle_folder(one, store) for one in surrogate.split(",")] if surrogate else (),
            size=size,
            attacks=_names(attacks, oblivious.ATTACKS),
            adaptive=_names(adaptive, knowing.KNOWING),
            rivals=rivals,
            baselines=_names(baselines, tuple(BASELINES)),
            convergence=convergence,
            epsilons=[_number(text) for text in epsilons.split(",")],
            seeds=[whole_number(text) for text in seeds.split(",")],
            workers=workers,
            device=device,
            command=["twogate", *sys.argv[1:]],
        )
    typer.echo(page)


def _pairs(texts: list[str]) -> dict[str, Path]:
    pairs = [task_folder(text) for text in texts]
    twice = [name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number])]
    if twice:
        raise TwogateError(f"--task {twice[0]}= is there twice: give each folder a name of its own")
    return dict(pairs)


def _names(text: str, every: tuple[str, ...]) -> tuple[str, ...]:
    return {"all": every, "none": ()}.get(text) if text in ("all", "none") else tuple(text.split(","))  # type: ignore[return-value]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TwogateError(f"{text!r} is no number") from None
