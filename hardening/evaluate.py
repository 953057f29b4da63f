"""What the defence is worth on test images: accuracy, detection and embedding quality, clean and attacked.

Terms of methods 0.1: `clean_acc` top-1 on clean images (the paper's BA), `robust_acc` top-1 on attacked images against the
true labels (RA), `fooling_rate` share of images whose prediction the attack changed (the papers' ASR). All are sums over
images divided by their number. Both attacks are made on the PUBLIC victim, as in the paper's main tables: they say nothing
about an attacker who knows the defence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hardening.attacks.features import apply_universal, pgd_features, uap_features
from hardening.branches import BRANCHES, MPAE, TRIPWIRE, Head, fuse, guard, rfdm_weights
from hardening.calibrate import Calibrated, collect
from hardening.data import Dataset
from hardening.detectors import ConsistencyDetector, PaperDetector
from hardening.encoders import Encoder
from hardening.knn import knn_predict
from hardening.measure.changes import honest_changes
from hardening.progress import Bars
from hardening.recipe import Evaluate
from model_store.calibration import Calibration

CLEAN, NOISE, PGD, UAP = "clean", "random sign noise", "PGD on features", "universal perturbation"
ATTACKS = (PGD, UAP)
UNDEFENDED, SINGLE = "undefended victim", "hardened victim alone"
RETURNED = "returned embedding"
BUDGETS = (0.001, 0.01, 0.05)


@dataclass(frozen=True)
class Record:
    """One number: what was measured, of what, on which images."""

    metric: str
    subject: str
    condition: str
    value: float
    images: int


@dataclass(frozen=True)
class Evaluation:
    """All numbers of a run, and the scores behind the plots."""

    records: tuple[Record, ...]
    scores: dict[str, NDArray[np.float32]]
    """Condition -> score [n] of the bundle's detector."""
    settings: dict[str, Any]

    def value(self, metric: str, subject: str, condition: str) -> float | None:
        """One number, or None where it was not measured."""
        for record in self.records:
            if (record.metric, record.subject, record.condition) == (metric, subject, condition):
                return record.value
        return None

    def as_json(self) -> dict[str, Any]:
        """What `report/metrics.json` holds."""
        return {"settings": self.settings, "records": [asdict(record) for record in self.records]}


def evaluate(
    calibrated: Calibrated,
    public_victim: Encoder,
    dataset: Dataset,
    recipe: Evaluate,
    seed: int,
    device: str,
    bars: Bars,
) -> Evaluation:
    """Attack the public victim on test images and measure everything."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(dataset.splits["test"])[: recipe.images])
    images, labels = dataset.images[chosen], dataset.labels[chosen]
    conditions = {CLEAN: images, **_attacked(images, public_victim.to(device), dataset, recipe, seed, device, bars)}
    views = calibrated.gate.views
    features = {
        name: collect(views, pictures, ConsistencyDetector.views, device, bars, f"features: {name}")
        for name, pictures in conditions.items()
    }
    judged = {name: _judge(calibrated, found) for name, found in features.items()}
    scores = {name: score for name, (_, score) in judged.items()}
    records: list[Record] = []
    fooled: dict[str, NDArray[np.bool_]] = {}
    if dataset.labelled:
        predictions = {name: _predictions(found, judged[name][0], calibrated.heads) for name, found in features.items()}
        records += _accuracy(predictions, labels)
        fooled = {name: predictions[name][UNDEFENDED] != predictions[CLEAN][UNDEFENDED] for name in ATTACKS}
        records += _neighbours(calibrated, dataset, features, labels, recipe.neighbours, device, bars)
        records += _paper_detection(calibrated, dataset, features, fooled, device, bars)
    detector = calibrated.gate.detector.name
    records += _detection(detector, calibrated.calibration, scores, fooled)
    for name, pictures in honest_changes(images, seed).items():
        found = collect(views, pictures, ConsistencyDetector.views, device, bars, f"honest change: {name}")
        records += _false_positives(detector, calibrated.calibration, name, _judge(calibrated, found)[1])
    settings = {
        **recipe.model_dump(),
        "images": len(images),
        "seed": seed,
        "detector": detector,
        "rounding": "8 bits, clipped",
    }
    return Evaluation(tuple(records), scores, settings)


def _attacked(
    images: NDArray[np.uint8],
    victim: Encoder,
    dataset: Dataset,
    recipe: Evaluate,
    seed: int,
    device: str,
    bars: Bars,
) -> dict[str, NDArray[np.uint8]]:
    # The attacker's own images for the universal perturbation: as good as the defender's.
    surrogate, _ = dataset.take("local")
    delta = uap_features(
        victim, surrogate, epsilon=recipe.epsilon, epochs=recipe.uap_epochs, seed=seed, device=device, bars=bars
    )
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=images.shape)
    return {
        NOISE: np.clip(np.rint(images + recipe.epsilon * signs), 0, 255).astype(np.uint8),
        PGD: pgd_features(
            victim,
            images,
            epsilon=recipe.epsilon,
            steps=recipe.pgd_steps,
            restarts=recipe.pgd_restarts,
            seed=seed,
            device=device,
            bars=bars,
        ),
        UAP: apply_universal(images, delta),
    }


@torch.no_grad()
def _judge(calibrated: Calibrated, features: Mapping[str, Tensor]) -> tuple[Tensor, NDArray[np.float32]]:
    detector = calibrated.gate.detector.cpu()
    confidence, score = detector(features)
    return confidence, score.numpy()


def _predictions(
    features: Mapping[str, Tensor], confidence: Tensor, heads: Mapping[str, Head]
) -> dict[str, NDArray[np.int64]]:
    logits = torch.stack([heads[name](features[name]) for name in BRANCHES], dim=1)
    weights = rfdm_weights(logits)
    equal = torch.full_like(weights, 1 / len(BRANCHES))
    found = {
        UNDEFENDED: heads[TRIPWIRE](features[TRIPWIRE]),
        SINGLE: logits[:, BRANCHES.index(MPAE[0])],
        "hardened auxiliary alone": logits[:, BRANCHES.index(MPAE[1])],
        "BMP alone": logits[:, BRANCHES.index("bmp")],
        "three branches, plain average": fuse(logits, equal),
        "three branches, RFDM": fuse(logits, weights),
        "three branches, guarded RFDM": fuse(logits, guard(weights, confidence[:, : len(BRANCHES)])),
    }
    return {name: value.argmax(dim=1).numpy() for name, value in found.items()}


def _accuracy(predictions: Mapping[str, Mapping[str, NDArray[np.int64]]], labels: NDArray[np.int64]) -> list[Record]:
    records = []
    n = len(labels)
    for condition, by_system in predictions.items():
        for system, predicted in by_system.items():
            metric = "clean_acc" if condition == CLEAN else "robust_acc"
            records.append(Record(metric, system, condition, float((predicted == labels).mean()), n))
            if condition != CLEAN:
                changed = float((predicted != predictions[CLEAN][system]).mean())
                records.append(Record("fooling_rate", system, condition, changed, n))
    return records


def _neighbours(
    calibrated: Calibrated,
    dataset: Dataset,
    features: Mapping[str, Mapping[str, Tensor]],
    labels: NDArray[np.int64],
    neighbours: int,
    device: str,
    bars: Bars,
) -> list[Record]:
    """kNN accuracy against a gallery that no encoder was tuned on (fit and validation)."""
    gate = calibrated.gate.cpu()
    gallery = np.concatenate([dataset.splits["fit"], dataset.splits["validation"]])
    known = collect(gate.views, dataset.images[gallery], (*BRANCHES, TRIPWIRE), device, bars, "features of the gallery")
    records = []
    for subject in (UNDEFENDED, RETURNED):

        def vectors(found: Mapping[str, Tensor], subject: str = subject) -> Tensor:
            return found[TRIPWIRE] if subject == UNDEFENDED else gate.embedding(found)

        for condition, found in features.items():
            predicted = knn_predict(vectors(known), dataset.labels[gallery], vectors(found), neighbours)
            records.append(Record("knn_acc", subject, condition, float((predicted == labels).mean()), len(labels)))
    return records


def _detection(
    detector: str,
    calibration: Calibration,
    scores: Mapping[str, NDArray[np.float32]],
    fooled: Mapping[str, NDArray[np.bool_]],
) -> list[Record]:
    """AUROC, and how much is flagged at each budget; the thresholds were fixed on clean images before."""
    records = _false_positives(detector, calibration, CLEAN, scores[CLEAN])
    for attack in ATTACKS:
        truth = np.repeat([0, 1], [len(scores[CLEAN]), len(scores[attack])])
        auroc = float(roc_auc_score(truth, np.concatenate([scores[CLEAN], scores[attack]])))
        records.append(Record("auroc", detector, attack, auroc, len(truth)))
        p = calibration.p_value(scores[attack])
        for budget in BUDGETS:
            if budget < calibration.smallest_budget:
                continue
            records.append(Record(f"tpr@{budget:g}", detector, attack, float((p <= budget).mean()), len(p)))
            if attack in fooled and fooled[attack].any():
                hit = float((p[fooled[attack]] <= budget).mean())
                records.append(Record(f"tpr_fooled@{budget:g}", detector, attack, hit, int(fooled[attack].sum())))
    return records


def _false_positives(detector: str, calibration: Calibration, condition: str, score: NDArray[np.float32]) -> list[Record]:
    p = calibration.p_value(score)
    return [
        Record(f"fpr@{budget:g}", detector, condition, float((p <= budget).mean()), len(p))
        for budget in BUDGETS
        if budget >= calibration.smallest_budget
    ]


def _paper_detection(
    calibrated: Calibrated,
    dataset: Dataset,
    features: Mapping[str, Mapping[str, Tensor]],
    fooled: Mapping[str, NDArray[np.bool_]],
    device: str,
    bars: Bars,
) -> list[Record]:
    """The paper's rule beside the bundle's detector, given the same calibration."""
    if calibrated.gate.detector.name == PaperDetector.name:
        return []
    rule = PaperDetector(calibrated.heads)
    clean, _ = dataset.take("calibration")
    found = collect(calibrated.gate.views, clean, BRANCHES, device, bars, "calibrate the paper's rule")
    with torch.no_grad():
        table = Calibration(source="as above", scores=tuple(np.sort(rule(found)[1].numpy().astype(float))))
        scores = {name: rule(by_view)[1].numpy() for name, by_view in features.items()}
    return _detection(rule.name, table, scores, fooled)
