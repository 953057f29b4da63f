"""`twogate harden`: from a recipe and a folder of images to a bundle, stage by stage.

data → encoders (public weights or pre-training) → fine-tuning → sentinel, if any → assembly → calibration → export →
measuring → publication.
Every stage leaves its result in the run directory, written beside and renamed; a run that was killed goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hardening import data, encoders
from hardening.branches import BMP, MPAE, SENTINEL, TRIPWIRE
from hardening.calibrate import assemble, by_branch, calibrate
from hardening.card import write_card
from hardening.detectors import PaperDetector
from hardening.encoders import Encoder
from hardening.export import check_parity, export, golden
from hardening.files import load_tensors, save_tensors, write_atomically
from hardening.finetune import finetune
from hardening.gate import Gate
from hardening.measure.oblivious import UNIVERSAL, check_names, digest_of
from hardening.measure.records import Origin, Record, read
from hardening.measure.rivals import PAPER
from hardening.measure.sizes import SIZES
from hardening.measure.suite import Plan, craft_perturbations, measure_task
from hardening.measure.tasks import attackers_images
from hardening.preflight import check_encoders
from hardening.pretrain import pretrain
from hardening.process import check_device, prepare_process
from hardening.progress import Bars
from hardening.provenance import commit
from hardening.recipe import ROLES, EncoderSpec, Finetune, Recipe, RecipeError, load_recipe
from hardening.sentinel import train_sentinel
from hardening.workers import Job, run_jobs
from model_store.bundle import Bundle, load_bundle, verify_bundle
from model_store.errors import TwogateError
from model_store.manifest import MODEL_FILE, Branch, Detector, Manifest
from model_store.store import publishing, resolve, try_store, versions

_LIBRARIES = ("torch", "timm", "lightly", "scikit-learn", "onnx", "onnxruntime", "numpy", "pillow")
_USUAL_BUDGET = 0.01
_LEAST_TO_PRETRAIN = 16
_SIZE = "small"
"""How hard the attacks of the card try; `twogate evaluate` has others."""


class RunError(TwogateError):
    """The run directory cannot be used."""


def harden(
    recipe_path: Path, data_root: Path, store: Path, run: Path | None = None, device: str = "auto", bars: Bars | None = None
) -> Path:
    """Run a recipe on the images below `data_root` and publish the bundle in `store`; returns the bundle's folder.

    `run` keeps what was done (default: runs/<recipe's name>); the same call after a kill goes on from there, and after the
    end returns the bundle that it made. `device` is auto, cpu or cuda. Raises TwogateError's children with messages that
    say what to do.
    """
    recipe = load_recipe(recipe_path)
    check_names(recipe.evaluate.attacks)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    run = run or Path("runs") / recipe.name
    prepare_process()
    with bars or Bars() as shown, _owned(run, recipe, data_root):
        finished = run / "bundle.json"
        if finished.exists():
            place = Path(json.loads(finished.read_text(encoding="utf-8"))["bundle"])
            if place.is_dir():
                if not (store.exists() and place.parent.parent.samefile(store)):
                    raise RunError(f"this run has already published {place}: copy it to {store}, or start anew with --run")
                shown.say(f"this run has already published {place}; a new run directory starts anew")
                return place
        try_store(store, recipe.name)
        if not any((run / "encoders").glob("*.pt")):
            check_encoders(recipe, shown)
        return _run(recipe, data_root, store, run, finished, device, shown)


def _run(recipe: Recipe, data_root: Path, store: Path, run: Path, finished: Path, device: str, bars: Bars) -> Path:
    dataset = data.prepare(data_root, recipe.pixels, recipe.splits, recipe.splits.seed, run / "data", bars)
    bars.say(f"data: {', '.join(f'{len(indices)} {name}' for name, indices in dataset.splits.items() if len(indices))}")
    if recipe.detector == PaperDetector.name and not dataset.labelled:
        raise RecipeError("the detector `paper` reads classifier heads and needs labelled images, train/<class>/*")
    for role in ROLES:
        spec: EncoderSpec = getattr(recipe, role)
        if spec.pretrain and len(dataset.splits[spec.pretrain.split]) < _LEAST_TO_PRETRAIN:
            raise RecipeError(
                f"{role}.pretrain has {len(dataset.splits[spec.pretrain.split])} images and needs {_LEAST_TO_PRETRAIN}: "
                f"raise splits.{spec.pretrain.split}"
            )
        if spec.pretrain and spec.pretrain.method in ("supcon", "supervised") and not dataset.labelled:
            raise RecipeError(f"{role}.pretrain: {spec.pretrain.method} needs labelled images, train/<class>/*")
    staged = run / "staged"
    if not versions(staged, recipe.name):
        _stage(recipe, data_root, dataset, staged, run, device, bars)
    bundle = load_bundle(resolve(staged, recipe.name))
    for line in verify_bundle(bundle.path):
        bars.say(f"verified {line}")
    records = _measured(bundle, recipe, dataset, run, device, bars)
    with publishing(store, recipe.name) as publication:
        (publication.path / MODEL_FILE).write_bytes(bundle.model)
        write_card(publication.path, bundle.manifest, records)
        place = publication.seal(bundle.manifest)
    write_atomically(finished, json.dumps({"bundle": str(place.resolve())}).encode())
    bars.say(f"published {place}")
    calibration = bundle.manifest.calibration
    smallest = calibration.smallest_budget
    if smallest > _USUAL_BUDGET:
        bars.say(
            f"its {calibration.n} calibration images support no max_fpr below {smallest:.2g}, and serving asks for "
            f"{_USUAL_BUDGET:g}: serve it with --max-fpr 0.05 or so, or bring more clean images"
        )
    return place


def _stage(recipe: Recipe, data_root: Path, dataset: data.Dataset, staged: Path, run: Path, device: str, bars: Bars) -> None:
    """Make the bundle without its card, in a store of the run's own: what is measured is the file that will ship."""
    # Side by side on an accelerator too: networks this small leave it waiting for the processor.
    workers = min(len(ROLES), os.cpu_count() or 1)
    jobs = [Job(role, _train_job, (recipe, data_root, role, run, device)) for role in ROLES]
    if not all((run / "encoders" / f"finetune {role}.pt").exists() for role in ROLES):
        run_jobs(jobs, workers, bars)
    tuned = {role: train_encoder(recipe, dataset, role, run, device, bars) for role in ROLES}
    victim = public_encoder(recipe, dataset, "victim", run, device, bars)
    sentinel = None
    if recipe.detector == SENTINEL:
        sentinel = train_sentinel(
            by_branch(victim, tuned),
            recipe.sentinel,
            dataset.take("local")[0],
            seed=recipe.seed,
            folder=run / "encoders",
            device=device,
            bars=bars,
        )
    views = assemble(victim, tuned, dataset.images[dataset.splits["fit"][:8]], sentinel)
    calibrated = calibrate(views, dataset, recipe.detector, device, bars, quiet_on_changes=recipe.quiet_on_changes)
    bars.say("export to ONNX")
    gate = calibrated.gate.to("cpu")
    model = export(gate, dataset.images[dataset.splits["fit"][:2]])
    parity = check_parity(gate, model, dataset.images[dataset.splits["test"][:7]])
    manifest = Manifest(
        name=recipe.name,
        version=1,
        created=datetime.now(UTC).replace(microsecond=0),
        pixels=recipe.pixels,
        embedding_dim=sum(map(sum, gate.dims().values())),
        branches=_branches(recipe, gate),
        detector=Detector(
            name=gate.detector.name,
            description=gate.detector.description,
            parameters=gate.detector.parameters_for_people(),
        ),
        calibration=calibrated.calibration,
        files={},
        golden=golden(model, recipe.pixels),
        provenance={
            "recipe": recipe.model_dump(mode="json"),
            "data": dataset.summary(),
            "weights": _weights(recipe),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            "python": platform.python_version(),
            "commit": commit(),
            "device": device if device == "cpu" else torch.cuda.get_device_name(),
            "cores": os.cpu_count(),
            "seconds": _training_seconds(run),
            "parity": parity,
        },
    )
    with publishing(staged, recipe.name) as publication:
        (publication.path / MODEL_FILE).write_bytes(model)
        publication.seal(manifest)


def train_encoder(recipe: Recipe, dataset: data.Dataset, role: str, run: Path, device: str, bars: Bars) -> Encoder:
    """Make one tuned encoder (`victim`, `auxiliary` or `bmp`), or load what an earlier call left; on the CPU."""
    start = public_encoder(recipe, dataset, role, run, device, bars)
    tuned, _ = finetune(
        start,
        recipe.bmp_finetune if role == "bmp" else recipe.finetune,
        dataset.take("local"),
        dataset.take("validation"),
        job=f"finetune {role}",
        seed=recipe.seed,
        folder=run / "encoders",
        device=device,
        bars=bars,
    )
    return tuned


def public_encoder(recipe: Recipe, dataset: data.Dataset, role: str, run: Path, device: str, bars: Bars) -> Encoder:
    """The encoder before tuning: public weights, or pre-trained here."""
    spec: Any = getattr(recipe, role)
    # Encoders of one architecture must not start from the same random weights. What stands in for a public encoder is the
    # same one for every seed of a defence, as a downloaded file would be.
    public = spec.pretrain is not None and spec.pretrain.split == "public"
    seed = ROLES.index(role) + len(ROLES) * (0 if public else recipe.seed)
    # Said once, not again when a finished training is loaded.
    done = (run / "encoders" / f"finetune {role}.pt").exists()
    key = _key(run / "encoders" / f"key {role}.pt") if spec.keyed else None
    encoder = encoders.build(spec, seed, None if done else bars.say, key)
    if spec.pretrain is None:
        return encoder
    images, labels = dataset.take(spec.pretrain.split)
    trained, _ = pretrain(
        encoder,
        spec.pretrain,
        images,
        labels,
        job=f"pretrain {role}",
        seed=seed,
        folder=run / "encoders",
        device=device,
        bars=bars,
    )
    return trained


def _key(file: Path) -> torch.Tensor:
    """The run's secret key, drawn once."""
    if not file.exists():
        save_tensors(file, {"key": encoders.draw_key()})
    key: torch.Tensor = load_tensors(file)["key"]
    return key


def _train_job(recipe: Recipe, data_root: Path, role: str, run: Path, device: str, *, bars: Bars) -> None:
    dataset = data.prepare(data_root, recipe.pixels, recipe.splits, recipe.splits.seed, run / "data", bars)
    train_encoder(recipe, dataset, role, run, device, bars)


def _measured(bundle: Bundle, recipe: Recipe, dataset: data.Dataset, run: Path, device: str, bars: Bars) -> list[Record]:
    """Attack the staged bundle's public victim on the recipe's own test split; what is on disk is not measured again."""
    wanted = recipe.evaluate
    paper = bundle.manifest.detector.name == PaperDetector.name
    plan = Plan(
        bundle=bundle.path,
        surrogates=(),
        # All images that the recipe keeps for it, not a sample, fit the heads.
        size=replace(SIZES[_SIZE], images=wanted.images, clean=wanted.images, fit=len(dataset.images)),
        attacks=wanted.attacks,
        knowing=(),
        rivals=() if paper or not dataset.labelled else (PAPER,),
        baselines=(),
        convergence=False,
        epsilons=(wanted.epsilon,),
        seeds=(recipe.seed,),
        attackers=digest_of(attackers_images(dataset, bundle.manifest, SIZES[_SIZE].surrogate, run, bars)[0]),
        out=run / "evaluation",
        # The digest of a manifest covers these records too, so they name the graph instead.
        origin=Origin(recipe.name, bundle.model_sha256, _SIZE, "twogate harden", commit()),
        device=device,
    )
    # The paper's detector needs no tripwire, so its graph has none.
    victim = public_encoder(recipe, dataset, "victim", run, device, bars) if paper else None
    for attack in wanted.attacks:
        if attack in UNIVERSAL:
            craft_perturbations(plan, "test", dataset, attack, victim, bars=bars)
    measure_task(plan, "test", dataset, victim, bars=bars)
    return read(plan.out / "records")


def _branches(recipe: Recipe, gate: Gate) -> tuple[Branch, ...]:
    dims = gate.dims()
    described = {
        MPAE[0]: f"the public victim ({recipe.victim.architecture}), {_tuning(recipe.finetune)}",
        MPAE[1]: f"a second encoder {_origin(recipe.auxiliary)}, {_tuning(recipe.finetune)}",
        BMP: f"an encoder {_origin(recipe.bmp)}, {_tuning(recipe.bmp_finetune)}",
        TRIPWIRE: f"the public victim ({recipe.victim.architecture}) as it was; watched, not part of the embedding",
        SENTINEL: "a small network that was trained on local images to see perturbations; not part of the embedding",
    }
    roles: dict[str, Any] = {BMP: "bmp", TRIPWIRE: "tripwire", SENTINEL: "sentinel"}
    return tuple(
        Branch(
            name=name,
            role=roles.get(name, "mpae"),
            description=described[name],
            embedding_dim=sum(dims.get(name, ())),
            parts=dims.get(name, ()),
        )
        for name in gate.detector.branches
    )


def _origin(spec: EncoderSpec) -> str:
    """Where an encoder began: whether others can have its like is what an attack on it depends on."""
    if spec.pretrain is None:
        return f"({spec.architecture}) of public weights"
    began = "" if spec.weights is None else "of public weights, then "
    images = "local images only" if spec.pretrain.split == "local" else "the split `public`"
    return f"({spec.architecture}) {began}pre-trained on {images}"


def _tuning(recipe: Finetune) -> str:
    if not recipe.epochs:
        return "as it was"
    return f"adversarially fine-tuned (epsilon {recipe.epsilon:g})" if recipe.epsilon else "fine-tuned on clean local images"


def _training_seconds(run: Path) -> dict[str, int]:
    """Wall-clock seconds of each training, added up over its epochs, those before a kill included."""
    histories = {
        file.stem: load_tensors(file)["history"]
        for file in sorted((run / "encoders").glob("*.pt"))
        # Beside trainings lie secret keys, and what a stop at a bad moment left.
        if not file.stem.startswith("key ") and not file.stem.endswith((".checkpoint", ".attacks"))
    }
    return {
        job: round(sum(record["seconds"] for record in history))
        for job, history in histories.items()
        if all("seconds" in record for record in history)
    }


def _weights(recipe: Recipe) -> dict[str, str]:
    """sha256 of each role's weights file: one that is written over meanwhile is another encoder."""
    specs = {role: getattr(recipe, role).weights for role in ROLES}
    return {
        role: hashlib.sha256(encoders.find_weights(source).read_bytes()).hexdigest()
        for role, source in specs.items()
        if source not in (None, "timm")
    }


@contextmanager
def _owned(run: Path, recipe: Recipe, data_root: Path) -> Iterator[None]:
    """Hold the run directory; RunError where another process has it, or it belongs to another recipe, data folder or weights
    file."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is working in {run}") from None
        file = run / "run.json"
        # What has become of the weights files since does not matter to a run that has ended.
        ended = (run / "bundle.json").exists()
        files = json.loads(file.read_text(encoding="utf-8")).get("weights") if ended else _weights(recipe)
        parts = {"recipe": recipe.model_dump(mode="json"), "data": str(data_root.resolve()), "weights": files}
        identity = json.dumps(parts, indent=1)
        if file.exists() and file.read_text(encoding="utf-8") != identity:
            if ended or any((run / "encoders").glob("*.pt")):
                raise RunError(
                    f"{run} belongs to another recipe, data folder or weights file; choose another with --run, or remove it"
                )
            # Nothing was trained yet: a mistake has been mended, and what was decoded may have been cut otherwise.
            shutil.rmtree(run / "data", ignore_errors=True)
            file.unlink()
        if not file.exists():
            write_atomically(file, identity.encode())
        yield
