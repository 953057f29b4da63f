"""`twogate harden`: from a recipe and a folder of images to a bundle, stage by stage.

data → encoders (public weights or pre-training) → fine-tuning → assembly → calibration → evaluation → export → publication.
Every stage leaves its result in the run directory, written beside and renamed; a run that was killed goes on where it was.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hardening import data, encoders
from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE
from hardening.calibrate import Calibrated, assemble, calibrate
from hardening.encoders import Encoder
from hardening.evaluate import Evaluation, Record, evaluate
from hardening.export import check_parity, export, golden
from hardening.files import load_tensors, save_tensors, write_atomically
from hardening.finetune import finetune
from hardening.memory import keep_freed_memory
from hardening.pretrain import pretrain
from hardening.progress import Bars
from hardening.provenance import commit
from hardening.recipe import Recipe, load_recipe
from hardening.report import write_report
from hardening.workers import Job, run_jobs
from model_store.bundle import verify_bundle
from model_store.errors import TwogateError
from model_store.manifest import MODEL_FILE, Branch, Detector, Manifest
from model_store.store import publishing

ROLES = ("auxiliary", "victim", "bmp")
_LIBRARIES = ("torch", "timm", "lightly", "scikit-learn", "onnx", "onnxruntime", "numpy", "pillow")
_USUAL_BUDGET = 0.01
_LIMITS = """\
- Assume that an attacker who has the defence's weights, and aims at score and embedding together, evades it. That attack
  has not been measured here.
- Everything above was attacked on the undefended public victim, without knowledge of the defence, and at one budget.
- The thresholds hold for images like those of the calibration. Other domains, strong blur or heavy editing raise false
  alarms: compare the table above, and calibrate on your own images.
- The verdict says whether an image looks like an attack on the encoder. It is no filter for content, and no malware scan."""


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
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise RunError(f"there is no device {device!r} here; use --device cpu") from None
    run = run or Path("runs") / recipe.name
    keep_freed_memory()
    with bars or Bars() as shown, _owned(run, recipe, data_root):
        finished = run / "bundle.json"
        if finished.exists():
            place = Path(json.loads(finished.read_text(encoding="utf-8"))["bundle"])
            if place.is_dir():
                shown.say(f"this run has already published {place}; a new run directory starts anew")
                return place
        place = _run(recipe, data_root, store, run, device, shown)
        write_atomically(finished, json.dumps({"bundle": str(place.resolve())}).encode())
        return place


def _run(recipe: Recipe, data_root: Path, store: Path, run: Path, device: str, bars: Bars) -> Path:
    dataset = data.prepare(data_root, recipe.pixels, recipe.splits, recipe.splits.seed, run / "data", bars)
    bars.say(f"data: {', '.join(f'{len(indices)} {name}' for name, indices in dataset.splits.items() if len(indices))}")
    workers = min(len(ROLES), os.cpu_count() or 1) if device == "cpu" else 1
    jobs = [Job(role, _train_job, (recipe, data_root, role, run, device)) for role in ROLES]
    if not all((run / "encoders" / f"finetune {role}.pt").exists() for role in ROLES):
        run_jobs(jobs, workers, bars)
    public = public_encoder(recipe, dataset, "victim", run, device, bars)
    tuned = {role: train_encoder(recipe, dataset, role, run, device, bars) for role in ROLES}
    sample = dataset.images[dataset.splits["fit"][:8]]
    views = assemble(public_encoder(recipe, dataset, "victim", run, device, bars), tuned, sample)
    calibrated = calibrate(views, dataset, recipe.detector, device, bars)
    evaluation = _evaluated(calibrated, public, dataset, recipe, run, device, bars)
    bars.say("export to ONNX")
    gate = calibrated.gate.to("cpu")
    model = export(gate, dataset.images[dataset.splits["fit"][:2]])
    parity = check_parity(gate, model, dataset.images[dataset.splits["test"][:7]])
    manifest = Manifest(
        name=recipe.name,
        version=1,
        created=datetime.now(UTC).replace(microsecond=0),
        pixels=recipe.pixels,
        embedding_dim=sum(tuned[role].dim for role in ROLES),
        branches=_branches(recipe, calibrated, tuned),
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
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            "python": platform.python_version(),
            "commit": commit(),
            "device": device if device == "cpu" else torch.cuda.get_device_name(),
            "cores": os.cpu_count(),
            "seconds": _training_seconds(run),
            "parity": parity,
        },
    )
    with publishing(store, recipe.name) as publication:
        (publication.path / MODEL_FILE).write_bytes(model)
        write_report(publication.path, evaluation, _card(recipe, dataset, manifest, model))
        place = publication.seal(manifest)
    for line in verify_bundle(place):
        bars.say(f"verified {line}")
    bars.say(f"published {place}")
    smallest = manifest.calibration.smallest_budget
    if smallest > _USUAL_BUDGET:
        bars.say(
            f"its {manifest.calibration.n} calibration images support no max_fpr below {smallest:.2g}, and serving asks for "
            f"{_USUAL_BUDGET:g}: serve it with --max-fpr 0.05 or so, or bring more clean images"
        )
    return place


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
    # Encoders of one architecture must not start from the same random weights.
    seed = recipe.seed + ROLES.index(role)
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


def _evaluated(
    calibrated: Calibrated, public: Encoder, dataset: data.Dataset, recipe: Recipe, run: Path, device: str, bars: Bars
) -> Evaluation:
    """Evaluate, or load an evaluation that an earlier call finished."""
    file = run / "evaluation.npz"
    if file.exists():
        with np.load(file) as saved:
            content = json.loads(str(saved["json"]))
            scores = {name.removeprefix("score "): saved[name] for name in saved.files if name.startswith("score ")}
        return Evaluation(tuple(Record(**record) for record in content["records"]), scores, content["settings"])
    evaluation = evaluate(calibrated, public, dataset, recipe.evaluate, recipe.seed, device, bars)
    beside = run / ".evaluation.partial.npz"
    arrays: dict[str, Any] = {f"score {name}": score for name, score in evaluation.scores.items()}
    np.savez(beside, json=json.dumps(evaluation.as_json()), **arrays)
    beside.replace(file)
    return evaluation


def _branches(recipe: Recipe, calibrated: Calibrated, tuned: dict[str, Encoder]) -> tuple[Branch, ...]:
    role = {MPAE[0]: "victim", MPAE[1]: "auxiliary", BMP: "bmp"}
    described = {
        MPAE[0]: f"the public victim ({recipe.victim.architecture}), adversarially fine-tuned",
        MPAE[1]: f"a second public encoder ({recipe.auxiliary.architecture}), adversarially fine-tuned",
        BMP: f"an encoder ({recipe.bmp.architecture}) that was trained on clean local images only",
        TRIPWIRE: f"the public victim ({recipe.victim.architecture}) as it was; watched, not part of the embedding",
    }
    return tuple(
        Branch(
            name=name,
            role="tripwire" if name == TRIPWIRE else "bmp" if name == BMP else "mpae",
            description=described[name],
            embedding_dim=tuned[role[name]].dim if name in BRANCHES else 0,
        )
        for name in calibrated.gate.detector.branches
    )


def _training_seconds(run: Path) -> dict[str, int]:
    """Wall-clock seconds of each training, added up over its epochs, those before a kill included."""
    histories = {
        file.stem: load_tensors(file)["history"]
        for file in sorted((run / "encoders").glob("*.pt"))
        if not file.stem.startswith("key ")
    }
    return {
        job: round(sum(record["seconds"] for record in history))
        for job, history in histories.items()
        if all("seconds" in record for record in history)
    }


def _card(recipe: Recipe, dataset: data.Dataset, manifest: Manifest, model: bytes) -> dict[str, Any]:
    rule, calibration = recipe.pixels, manifest.calibration
    facts = [
        ["input", f"{rule.width} x {rule.height} pixels, RGB, whole picture resized ({rule.resample})"],
        ["embedding", f"{manifest.embedding_dim} values, unit length; compare with a dot product"],
        *([branch.name, branch.description] for branch in manifest.branches),
        ["detector", f"{manifest.detector.name}: {manifest.detector.description}"],
        ["calibration", f"{calibration.source}; smallest max_fpr {calibration.smallest_budget:.2g}"],
        ["licence of the data", recipe.data_licence],
        ["licence of the weights", recipe.weights_licence],
        ["size", f"{len(model) / 2**20:.1f} MiB, weights stored in 8 bits"],
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    provenance = manifest.provenance
    spent = ", ".join(f"{name} {value / 60:.1f} min" for name, value in provenance["seconds"].items()) or "nothing to train"
    making = (
        f"`twogate harden` with the recipe below, seed {recipe.seed}, commit {provenance['commit']}, on "
        f"{provenance['cores']} cores ({provenance['device']}): {spent} (wall clock; side by side where there are cores). "
        "Images: "
        + ", ".join(f"{len(indices)} {name}" for name, indices in dataset.splits.items() if len(indices))
        + f"; sha256 {dataset.digest[:16]}….\n\nONNX against torch on real images, largest difference: "
        + ", ".join(f"{name} {value:.1e}" for name, value in provenance["parity"].items())
        + f".\n\n```json\n{json.dumps(provenance['recipe'], indent=1)}\n```"
    )
    return {
        "name": recipe.name,
        "description": recipe.description,
        "facts": "| | |\n| --- | --- |\n" + rows,
        "limits": _LIMITS,
        "making": making,
    }


@contextmanager
def _owned(run: Path, recipe: Recipe, data_root: Path) -> Iterator[None]:
    """Hold the run directory; RunError where another process has it or it belongs to another recipe or data folder."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is working in {run}") from None
        identity = json.dumps({"recipe": recipe.model_dump(mode="json"), "data": str(data_root.resolve())}, indent=1)
        file = run / "run.json"
        if not file.exists():
            write_atomically(file, identity.encode())
        elif file.read_text(encoding="utf-8") != identity:
            raise RunError(f"{run} belongs to another recipe or data folder; choose another one with --run, or remove it")
        yield
