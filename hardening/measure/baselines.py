"""Baseline defences beside the bundle's own: one encoder each, trained from the same public victim with the same budget.

PGD-AT, TRADES, MART and both stages of Gen-AF (`hardening.baselines`) start from the tripwire of the bundle's graph and see
the first task's `local` and `validation` images, with the epochs, batches, attacks and augmentation of the bundle's own
recipe. The recipe's learning rate was found for another loss: each baseline is trained with it and with smaller ones, and
the one that is best on `validation` is kept. On a task they are judged as every system here: a head on frozen features, of
the task's clean images.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardening.attacks.target import Seen, Target
from hardening.baselines import adversarial_training, gen_af
from hardening.baselines.classifier import Classifier, validate
from hardening.branches import TRIPWIRE, Head, train_head
from hardening.data import Dataset, spread
from hardening.encoders import Encoder, features
from hardening.files import load_tensors, save_tensors
from hardening.graph import Graph
from hardening.measure.tasks import Task
from hardening.progress import Bars
from model_store.bundle import Bundle
from model_store.errors import TwogateError
from model_store.manifest import Manifest

BASELINES = {"pgd-at": "PGD-AT", "trades": "TRADES", "mart": "MART", "gen-af": "Gen-AF"}
"""Names of the option, and of the systems in records."""
_METHODS: dict[str, adversarial_training.Method] = {"pgd-at": "pgd_at", "trades": "trades", "mart": "mart"}
_BUDGET = ("epochs", "batch_size", "epsilon", "steps", "learning_rate", "flip", "crop")
_RATES = (1.0, 0.3, 0.1)
"""Learning rates, in shares of the recipe's."""
_SMOKE_BUDGET: dict[str, Any] = {"epochs": 1, "batch_size": 32, "epsilon": 8.0, "steps": 1, "learning_rate": 1e-4}
_SMOKE_IMAGES = 96
_BATCH = 256


class BaselineError(TwogateError):
    """There is no such baseline, or it cannot be trained."""


def check_names(names: tuple[str, ...]) -> None:
    """BaselineError where a name is not a baseline's."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise BaselineError(f"there is no baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")


def budget(manifest: Manifest, size: str) -> dict[str, Any]:
    """What the training of the bundle's own encoders was given, of its recipe; next to nothing at size `smoke`."""
    if size == "smoke":
        return _SMOKE_BUDGET
    recipe = manifest.provenance.get("recipe", {}).get("finetune", {})
    missing = [name for name in _BUDGET if name not in recipe]
    if missing:
        raise BaselineError(
            f"{manifest.name}/{manifest.version} does not say how it was tuned (provenance.recipe.finetune: "
            f"{', '.join(missing)}), so a baseline cannot be given the same"
        )
    return {name: recipe[name] for name in _BUDGET}


def public_victim(bundle: Bundle) -> Encoder:
    """The bundle's public victim, to be trained; its normalisation is in the graph already."""
    tripwire: Any = Graph(bundle.model).encoder(TRIPWIRE)
    victim = tripwire.trainable()
    rule = bundle.manifest.pixels
    with torch.no_grad():
        victim.num_features = victim(torch.zeros(1, 3, rule.height, rule.width)).shape[1]
    return Encoder(victim, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).eval()


def train_baseline(
    name: str, bundle: Bundle, dataset: Dataset, file: Path, *, seed: int, size: str, device: str, bars: Bars
) -> None:
    """Train a baseline's encoder on the `local` images of a labelled dataset and keep it in `file`, unless it is there.

    Checkpoints of every epoch lie beside it until it is done.
    """
    if file.exists():
        return
    local, validation = dataset.take("local"), dataset.take("validation")
    if size == "smoke":
        # One of each class at least.
        some = np.union1d(spread(len(local[0]), _SMOKE_IMAGES), np.unique(local[1], return_index=True)[1])
        local = local[0][some], local[1][some]
    given = budget(bundle.manifest, size)
    folder = file.with_suffix(".training")
    shared: Any = {"seed": seed, "folder": folder, "device": device, "bars": bars}

    def trained(rate: float) -> tuple[float, Encoder]:
        own: Any = {**given, "learning_rate": rate, "job": f"{file.stem}-{rate:g}", **shared}
        victim = public_victim(bundle)
        if name == "gen-af":
            few: Any = {"layer_images": 32, "layer_epochs": 1} if size == "smoke" else {}
            # As long on clean images as before on attacked ones, as published.
            encoder, head, _ = gen_af.train(victim, local, validation, **own, adapt_epochs=given["epochs"], **few)
        else:
            encoder, head = adversarial_training.train(victim, _METHODS[name], local, validation, **own)
        found = validate(
            Classifier(encoder.to(device), head.to(device)),
            validation,
            epsilon=given["epsilon"],
            batch_size=_BATCH,
            generator=torch.Generator().manual_seed(seed),
            device=device,
        )
        said = " ".join(f"{metric} {value:.3g}" for metric, value in found.items())
        bars.say(f"{BASELINES[name]}, learning rate {rate:g}: {said}")
        return found["selection"], encoder.cpu()

    # Shorter searches mislead: on few images the smallest rate leaves the encoder as it is, and wins by its clean accuracy.
    rates = [share * given["learning_rate"] for share in (_RATES if size != "smoke" else _RATES[:1])]
    _, encoder = max(map(trained, rates), key=lambda found: found[0])
    save_tensors(file, {"encoder": encoder.state_dict()})
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Baseline:
    """A trained baseline with its head for one task."""

    name: str
    encoder: Encoder
    head: Head
    device: str
    before: NDArray[np.int64]
    """Predicted classes [N] of the clean test images."""

    @property
    def system(self) -> str:
        """The subject of its records."""
        return BASELINES[self.name]

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Images [N, H, W, 3] -> classes [N]."""
        return _predict(self.encoder, self.head, images, self.device)

    def target(self) -> Target:
        """It as an attacker sees it who knows everything; it has no detector, so nothing is flagged."""

        def see(images: Tensor) -> Seen:
            found = self.encoder(images)
            none = found.new_zeros(len(found))
            return Seen(found, none[:, None], none, {}, None, self.head(found))

        return Target(see, math.inf)


def fit_baseline(name: str, file: Path, bundle: Bundle, task: Task, device: str) -> Baseline:
    """Load a trained baseline, and fit its head to the very images that the bundle's heads were fitted to."""
    encoder = public_victim(bundle)
    encoder.load_state_dict(load_tensors(file)["encoder"])
    encoder.to(device)
    head = train_head(features(encoder, task.gallery_images, _BATCH, device), task.gallery_labels)
    return Baseline(name, encoder, head, device, _predict(encoder, head, task.images, device))


def _predict(encoder: Encoder, head: Head, images: NDArray[np.uint8], device: str) -> NDArray[np.int64]:
    return head(features(encoder, images, _BATCH, device)).argmax(dim=1).numpy()
