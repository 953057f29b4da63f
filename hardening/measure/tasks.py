"""A downstream task: labelled images through the bundle's pixel rule, and heads on the frozen branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardening import data
from hardening.branches import BMP, MPAE, TRIPWIRE, Head, fuse, guarded_vote, rfdm_weights, train_head
from hardening.calibrate import OWN_FOLDER
from hardening.graph import Graph, run_uint8
from hardening.heads import Linear, train_heads
from hardening.measure.sizes import Size
from hardening.progress import Bars
from hardening.recipe import RecipeError, Splits
from model_store.calibration import Calibration
from model_store.honest import KINDS, changed_each_way, to_be_changed
from model_store.manifest import Manifest

UNDEFENDED = "undefended victim"
GUARDED = "three branches, guarded"
"""What a task head of `twogate head train` answers."""
SYSTEMS = (
    UNDEFENDED,
    "hardened victim alone",
    "hardened auxiliary alone",
    "BMP alone",
    "three branches, plain average",
    "three branches, RFDM",
    GUARDED,
)
Images = Path | data.Dataset
"""A task's folder, or its images in the splits of the very run that made the bundle."""
_UNSEEN = Splits(local=0.15, validation=0.08, fit=0.47, calibration=0.3)


@dataclass(frozen=True)
class Task:
    """Images of one task, and what was fitted on its clean training images."""

    name: str
    images: NDArray[np.uint8]
    """[N, H, W, 3], of `test/`."""
    small_images: tuple[NDArray[np.uint8], ...]
    """The same; those smaller than the input as they are, [h, w, 3]."""
    labels: NDArray[np.int64]
    clean_images: NDArray[np.uint8]
    """[M, H, W, 3], of `test/`: more of them, for what is measured without an attack."""
    clean_labels: NDArray[np.int64]
    targets: NDArray[np.uint8]
    """[N, H, W, 3]: for each test image another one, of another class, which a targeted attack imitates."""
    victim_head: Head | None
    """On the public victim's features; None where the images have no classes."""
    served: tuple[Linear, ...]
    """The heads that `twogate head train` makes, one a branch, on the embedding."""
    gallery_images: NDArray[np.uint8]
    gallery: dict[str, Tensor]
    """Values of the graph on the images that the heads were fitted on."""
    gallery_labels: NDArray[np.int64]
    own_images: NDArray[np.uint8]
    """Clean training images that nothing was fitted on."""
    own_values: dict[str, Tensor]
    own_calibration: Calibration | None
    """The score's table on this task's clean images: what `twogate recalibrate` would write; the bundle's own, where it is of
    this task's folder calibration/. None where the detector was fitted on these and the table is of other images by now."""

    def predictions(self, values: Mapping[str, Tensor], manifest: Manifest) -> dict[str, NDArray[np.int64]]:
        """Predicted classes [N] by system; none without classes."""
        if self.victim_head is None:
            return {}
        logits = {**self.system_logits(values, manifest), UNDEFENDED: self.victim_head(values[TRIPWIRE])}
        return {name: found.argmax(dim=1).numpy() for name, found in logits.items()}

    def system_logits(self, values: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
        """Logits [N, C] by system that reads the branches, differentiable. `values` are `embedding` and `confidence`.

        All are of the same three heads, so that what differs is their fusion.
        """
        logits = self.served_logits(values["embedding"])
        heads = [head.branch for head in self.served]
        names = [branch.name for branch in manifest.branches]
        confidence = values["confidence"][:, [names.index(name) for name in heads]]
        scales = torch.tensor([head.scale for head in self.served]).to(logits)
        return {
            "hardened victim alone": logits[:, heads.index(MPAE[0])],
            "hardened auxiliary alone": logits[:, heads.index(MPAE[1])],
            "BMP alone": logits[:, heads.index(BMP)],
            "three branches, plain average": logits.mean(dim=1),
            "three branches, RFDM": fuse(logits, rfdm_weights(logits)),
            GUARDED: guarded_vote(logits * scales[:, None], confidence),
        }

    def served_logits(self, embedding: Tensor) -> Tensor:
        """Embeddings [N, D] -> logits [N, 3, C] of the served heads, in their order, before their fusion."""
        logits = []
        for head in self.served:
            weight, bias = (torch.as_tensor(value).to(embedding) for value in (head.weight, head.bias))
            logits.append(embedding[:, head.start : head.start + len(weight)] @ weight + bias)
        return torch.stack(logits, dim=1)


def graph_values(graph: Graph, images: NDArray[np.uint8], device: str, bars: Bars, what: str) -> dict[str, Tensor]:
    """Everything that is measured of a bundle on images: features by branch, `embedding`, `confidence`, `score`."""
    by_branch = graph.feature_names
    wanted = (*by_branch.values(), "embedding", "confidence", "score")
    parts: list[dict[str, Tensor]] = []
    with bars.task(what, len(images)) as task:
        for start in range(0, len(images), 256):
            parts.append(run_uint8(graph, images[start : start + 256], wanted, device))
            task.advance(len(images[start : start + 256]))
    found = {name: torch.cat([part[name] for part in parts]) for name in wanted}
    return {**{branch: found[value] for branch, value in by_branch.items()}, **{n: found[n] for n in wanted[-3:]}}


def read_images(root: Images, manifest: Manifest, into: Path, bars: Bars) -> data.Dataset:
    """A task's folder, decoded by the bundle's pixel rule, in splits whose `fit` and `calibration` no encoder was tuned on.

    Where it is the very data that the bundle was made from, those are the recipe's own splits.
    """
    if isinstance(root, data.Dataset):
        return root
    rule = manifest.pixels
    dataset = data.prepare(root, rule, _UNSEEN, _UNSEEN.seed, into / data.prepared_name(rule, _UNSEEN), bars)
    if dataset.digest != manifest.provenance.get("data", {}).get("sha256"):
        return dataset
    splits = Splits.model_validate(manifest.provenance["recipe"]["splits"])
    return data.prepare(root, rule, splits, splits.seed, into / data.prepared_name(rule, splits), bars)


def attackers_images(
    root: Images, manifest: Manifest, most: int, into: Path, bars: Bars
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [M, H, W, 3] of an attacker's own with their labels [M]: of `train/`, and none that is tested on."""
    dataset = read_images(root, manifest, into, bars)
    pool = np.concatenate([dataset.splits["local"], dataset.splits["validation"]])
    some = np.sort(np.random.default_rng(0).permutation(pool)[:most])
    return np.asarray(dataset.images[some]), dataset.labels[some]


def of_another_class(
    labels: NDArray[np.int64], which: NDArray[np.int64], pool: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """For each image of `which` [N] one of `pool` of another class, [N]: what a targeted attack imitates.

    Where all are of one class, or have none, the one before it in the pool.
    """
    if len(np.unique(labels[pool])) > 1:
        return np.array([rng.choice(pool[labels[pool] != labels[index]]) for index in which])
    return pool[(np.searchsorted(pool, which) + len(pool) - 1) % len(pool)]


def load_task(
    name: str, root: Images, graph: Graph, manifest: Manifest, size: Size, into: Path, device: str, bars: Bars
) -> Task:
    """Read a task's folder (train/<class>/*, test/<class>/*) and fit its heads on clean images that no encoder was tuned on.

    Images without classes get no heads: what the detector makes of them can be measured all the same. GraphError where the
    graph has no tripwire.
    """
    graph.encoder(TRIPWIRE)
    dataset = read_images(root, manifest, into, bars)
    made_from = manifest.provenance.get("data", {})
    if dataset.labelled and list(dataset.classes) == made_from.get("classes") and dataset.digest != made_from.get("sha256"):
        bars.say(
            f"{name}: has the classes of the images that {manifest.name}/{manifest.version} was made from, and is not that "
            "folder. Where it holds the same images, heads are fitted on some that encoders were tuned on, and are worse for "
            "it: give the folder that `twogate harden` was given, with all that was in it"
        )
    rng = np.random.default_rng(0)

    def shuffled(split: str) -> NDArray[np.int64]:
        return rng.permutation(dataset.splits[split])

    every, fit, own = shuffled("test"), np.sort(shuffled("fit")[: size.fit]), np.sort(shuffled("calibration")[: size.fit])
    test, clean = np.sort(every[: size.images]), np.sort(every[: max(size.images, size.clean)])
    gallery = graph_values(graph, dataset.images[fit], device, bars, f"{name}: clean features")
    fit_labels, labels = dataset.labels[fit], dataset.labels[test]
    present = np.unique(fit_labels)
    if dataset.labelled and len(present) < len(dataset.classes):
        raise RecipeError(
            f"{name}: {size.fit} images hold not all of its {len(dataset.classes)} classes; use a larger --size"
        )
    victim_head: Head | None = None
    served: list[Linear] = []
    if dataset.labelled:
        victim_head = train_head(gallery[TRIPWIRE], fit_labels)
        served = train_heads(manifest, gallery["embedding"].numpy(), fit_labels, len(dataset.classes))
    # The detector was fitted on the bundle's own calibration/ too; its table is of detectors that were not.
    fitted_on = dataset.digest == made_from.get("sha256") and dataset.paths[own[0]].startswith("calibration/")
    calibrated = fitted_on and manifest.calibration.source.endswith(OWN_FOLDER)
    own_values = graph_values(graph, dataset.images[own], device, bars, f"{name}: own calibration")
    changed = {}
    if manifest.calibration.changes and not fitted_on:
        with bars.task(f"{name}: own calibration, honestly changed", len(KINDS)) as progress:
            for kind, copies in changed_each_way(dataset.small(own[to_be_changed(len(own))]), 0, manifest.pixels):
                changed[kind] = run_uint8(graph, copies, ("score",), device)["score"].numpy()
                progress.advance()
    if calibrated:
        own_calibration: Calibration | None = manifest.calibration
    elif fitted_on:
        own_calibration = None
    else:
        own_calibration = Calibration.of(name, own_values["score"].numpy(), changed)
    return Task(
        name=name,
        images=dataset.images[test],
        small_images=tuple(dataset.small(test)),
        labels=labels,
        clean_images=dataset.images[clean],
        clean_labels=dataset.labels[clean],
        targets=dataset.images[of_another_class(dataset.labels, test, test, rng)],
        victim_head=victim_head,
        served=tuple(served),
        gallery_images=dataset.images[fit],
        gallery=gallery,
        gallery_labels=fit_labels,
        own_images=dataset.images[own],
        own_values=own_values,
        own_calibration=own_calibration,
    )
