"""`twogate evaluate` and `twogate attack`: from bundles and folders of images to records, a report and attacked pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hardening import provenance
from hardening.branches import TRIPWIRE
from hardening.data import prepare, prepared_name
from hardening.graph import Graph
from hardening.measure import baselines as others
from hardening.measure import knowing, oblivious
from hardening.measure.oblivious import TARGETED, UNIVERSAL, craft, craft_universal, digest_of, fingerprint, load_universal
from hardening.measure.records import Origin, check_attacker, check_same, read
from hardening.measure.render import write_report
from hardening.measure.rivals import RIVALS
from hardening.measure.sizes import SIZES
from hardening.measure.suite import Plan, craft_perturbations, measure_task, train_defence
from hardening.measure.tasks import attackers_images, of_another_class, read_images
from hardening.process import check_device, prepare_process
from hardening.progress import Bars
from hardening.recipe import Splits
from hardening.workers import Job, run_jobs
from model_store.bundle import load_bundle
from model_store.errors import TwogateError


class EvaluationError(TwogateError):
    """What was asked for cannot be measured."""


def evaluate(
    bundles: Sequence[Path],
    tasks: Mapping[str, Path],
    out: Path,
    *,
    surrogates: Sequence[Path] = (),
    size: str = "small",
    attacks: Sequence[str] = oblivious.ATTACKS,
    adaptive: Sequence[str] = (),
    rivals: bool = False,
    baselines: Sequence[str] = (),
    convergence: bool = False,
    epsilons: Sequence[float] = (8.0, 10.0),
    seeds: Sequence[int] = (0, 1, 2),
    workers: int = 1,
    device: str = "cpu",
    command: Sequence[str] = (),
    bars: Bars | None = None,
) -> Path:
    """Measure bundles on tasks (name -> folder) and write records and report to `out`; returns the report's page.

    The first task's training images are the attacker's own too, and what `baselines` (other defences) are trained on. Cells
    that are on disk are not measured again, so the same call goes on where it stopped; other bundles or seeds into the same
    folder add up to one report.
    """
    if size not in SIZES:
        raise EvaluationError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
    if baselines and not tasks:
        raise EvaluationError("baselines are trained on the first task: --task NAME=DIR")
    if not tasks and bundles:
        raise EvaluationError("name at least one task: --task NAME=DIR")
    oblivious.check_names(tuple(attacks))
    oblivious.check_budget(*epsilons)
    if min(seeds, default=0) < 0:
        raise EvaluationError("a seed is not negative")
    knowing.check_names(tuple(adaptive))
    others.check_names(tuple(baselines))
    if len({tuple(branch.name for branch in load_bundle(place).manifest.branches) for place in surrogates}) > 1:
        raise EvaluationError("surrogates that are attacked together must be of one recipe: these have other branches")
    for place in (*bundles, *surrogates):
        knowing.check_budgets(tuple(adaptive), load_bundle(place).manifest.calibration)
    check_device(device)
    names = {load_bundle(place).manifest.name for place in bundles}
    if len(names) > 1:
        raise EvaluationError(f"one report is of bundles of one recipe, and not of {', '.join(sorted(names))}")
    labels = [load_bundle(place).label for place in bundles]
    if len(set(labels)) < len(labels):
        raise EvaluationError("two of the bundles have one name and version: put them into one store, as versions")
    rules = {load_bundle(place).manifest.pixels for place in (*bundles, *surrogates)}
    if surrogates and len(rules) > 1:
        raise EvaluationError("a surrogate must take pictures of the size, and by the rule, of the bundle that is attacked")
    prepare_process()
    with bars or Bars() as shown:
        crafting, training, measuring = [], [], []
        for place in bundles:
            bundle = load_bundle(place)
            if place.resolve() in [surrogate.resolve() for surrogate in surrogates]:
                raise EvaluationError("the surrogate of a grey-box attacker must be another bundle than the one attacked")
            origin = Origin(bundle.label, bundle.manifest.digest, size, shlex.join(command), provenance.commit())
            check_same(out / "records", origin)
            first, images = next(iter(tasks.items()))
            # Decoded here, before two processes would do it at a time.
            for manifest in (bundle.manifest, *(load_bundle(surrogate).manifest for surrogate in surrogates)):
                for name, root in tasks.items():
                    read_images(root, manifest, out / "data" / name, shown)
            dataset = read_images(images, bundle.manifest, out / "data" / first, shown)
            attackers = digest_of(attackers_images(dataset, bundle.manifest, SIZES[size].surrogate, out, shown)[0])
            if baselines or set(attacks) & set(UNIVERSAL):
                check_attacker(out / "records", attackers)
            plan = Plan(
                place,
                tuple(surrogates),
                SIZES[size],
                tuple(attacks),
                tuple(adaptive),
                RIVALS if rivals else (),
                tuple(baselines),
                convergence,
                tuple(epsilons),
                tuple(seeds),
                attackers,
                out,
                origin,
                device,
            )
            if baselines:
                if not dataset.labelled:
                    raise EvaluationError(
                        f"{images}: baselines are trained on the first task, which must be labelled: train/<class>/*"
                    )
                others.budget(bundle.manifest, size)  # refused here, before hours of crafting
            crafting += [
                Job(f"{bundle.label} {name}", craft_perturbations, (plan, first, images, name))
                for name in attacks
                if name in UNIVERSAL
            ]
            training += [Job(f"{bundle.label} {name}", train_defence, (plan, first, images, name)) for name in baselines]
            measuring += [Job(f"{bundle.label} on {name}", measure_task, (plan, name, root)) for name, root in tasks.items()]
        run_jobs(crafting + training, workers, shown)
        run_jobs(measuring, workers, shown)
        records = read(out / "records")
        if not records:
            raise EvaluationError(f"there are no records in {out}")
        return write_report(records, out)


def attack(
    place: Path,
    root: Path,
    out: Path,
    *,
    name: str,
    epsilon: float,
    images: int,
    size: str,
    seed: int,
    device: str = "cpu",
    bars: Bars | None = None,
) -> list[Path]:
    """Attack images below `root` on a bundle's public victim; writes NAME-clean.png beside NAME-attack.png.

    The pictures have the bundle's input size, so that the service sees every value as it was made. Returns the attacked
    files. The attacker's own images, for a universal perturbation, are those of `train/`.
    """
    oblivious.check_names((name,))
    oblivious.check_budget(epsilon)
    if size not in SIZES:
        raise EvaluationError(f"there is no size {size!r}; there are {', '.join(SIZES)}")
    check_device(device)
    bundle = load_bundle(place)
    victim = Graph(bundle.model).to(device).encoder(TRIPWIRE)
    with bars or Bars() as shown:
        splits = Splits(local=0.6, validation=0.1, fit=0.15, calibration=0.15)
        rule = bundle.manifest.pixels
        least = {"test": 2 if name == TARGETED else 1, "local": 2 if name in UNIVERSAL else 1}
        into = out / ".data" / prepared_name(rule, splits)
        dataset = prepare(root, rule, splits, 0, into, shown, least=least)
        rng = np.random.default_rng(seed)
        test = np.sort(rng.permutation(dataset.splits["test"])[:images])
        clean = dataset.images[test]
        if name in UNIVERSAL:
            local = rng.permutation(dataset.splits["local"])[: SIZES[size].surrogate]
            surrogate = dataset.images[np.sort(local)]
            file = out / ".data" / f"{size}-{fingerprint(victim, surrogate)}" / f"{name}-{epsilon:g}-{seed}.npz"
            craft_universal(name, victim, surrogate, epsilon, seed, SIZES[size], file, device, shown)
            attacked = load_universal(file)(clean)
        else:
            targets = dataset.images[of_another_class(dataset.labels, test, dataset.splits["test"], rng)]
            attacked = craft(name, victim, clean, targets, epsilon, seed, SIZES[size], device, shown)
    written = []
    for number, index in enumerate(test):
        stem = f"{number:04d}-{Path(dataset.paths[index]).stem}"
        Image.fromarray(clean[number]).save(out / f"{stem}-clean.png")
        written.append(out / f"{stem}-{name}.png")
        Image.fromarray(attacked[number]).save(written[-1])
    return written
