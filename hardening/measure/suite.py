"""The evaluation of a bundle: which cells there are, and what each measures.

Terms: `clean_acc` top-1 on clean images (the papers' BA), `robust_acc` top-1 on attacked images against the
true labels (RA), `fooling_rate` share of images whose prediction the attack changed (the papers' ASR; no complement of
robust_acc). All are sums over images divided by their number. Attacked images are clipped and rounded to 8 bits, one by one.
The detector's thresholds are those of the bundle, fixed on clean images before any attack was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from hardening.attacks.target import Target
from hardening.branches import TRIPWIRE
from hardening.data import spread
from hardening.encoders import features
from hardening.graph import Graph
from hardening.knn import knn_predict
from hardening.measure.baselines import Baseline, fit_baseline, train_baseline
from hardening.measure.changes import honest_changes
from hardening.measure.knowing import HEAD_AWARE, attack_knowing, fewer_steps, target_of
from hardening.measure.oblivious import NOISE, UNIVERSAL, code_of, craft, craft_universal, fingerprint, kept, load_universal
from hardening.measure.records import CLEAN, Origin, Record, once
from hardening.measure.rivals import Rival, fit_rivals
from hardening.measure.sizes import Size
from hardening.measure.tasks import (
    GUARDED,
    UNDEFENDED,
    Images,
    Task,
    attackers_images,
    graph_values,
    load_task,
    read_images,
)
from hardening.progress import Bars
from hardening.recipe import RecipeError
from model_store.bundle import Bundle, load_bundle
from model_store.calibration import Calibration
from model_store.manifest import Manifest

BUDGETS = (0.001, 0.01, 0.05)
RETURNED = "returned embedding"
NEIGHBOURS = 20
_RECALL_AT = 10
_EXAMPLES = 4
_BASELINE_KNOWN = f"white box {HEAD_AWARE}"
"""Of a baseline: its own heads are attacked, as the bundle's are."""
LESS_EFFORT = (0.125, 0.25, 0.5)
"""Shares of an attack's steps or epochs, to see whether more would bring more."""


@dataclass(frozen=True)
class Plan:
    """What to measure; all of it can be pickled."""

    bundle: Path
    surrogates: tuple[Path, ...]
    """Other runs' bundles, as a grey-box attacker would train them; without any there is no grey box."""
    size: Size
    attacks: tuple[str, ...]
    knowing: tuple[str, ...]
    """Of the adaptive suite, by name."""
    rivals: tuple[str, ...]
    """Other detectors that judge the same attacked images, by name."""
    baselines: tuple[str, ...]
    """Other defences, by name, trained from the same public victim."""
    convergence: bool
    """Whether attacks are also made with less effort, for the first budget and seed."""
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    attackers: str
    """The digest of the attacker's own images, of which universal perturbations are made."""
    out: Path
    origin: Origin
    device: str


def with_effort(plan: Plan, share: float) -> Plan:
    """The plan of the same attacks on the public victim with a share of their effort, kept under a name of their own."""
    if share == 1:
        return plan
    origin = replace(plan.origin, size=f"{plan.origin.size}-effort-{share:g}")
    return replace(plan, size=plan.size.effort(share), origin=origin, epsilons=plan.epsilons[:1], seeds=plan.seeds[:1])


def craft_perturbations(
    plan: Plan, name: str, root: Images, attack: str, victim: nn.Module | None = None, *, bars: Bars
) -> None:
    """Make a universal attack's perturbations, once for all tasks, from the attacker's images in `root`.

    `victim` is needed where the bundle has no tripwire.
    """
    bundle = load_bundle(plan.bundle)
    victim = Graph(bundle.model, victim).to(plan.device).encoder(TRIPWIRE)
    images, _ = attackers_images(root, bundle.manifest, plan.size.surrogate, plan.out / "data" / name, bars)
    for one in (plan, *(with_effort(plan, share) for share in LESS_EFFORT if plan.convergence)):
        for epsilon in one.epsilons:
            for seed in one.seeds:
                file = attack_file(one, attack, epsilon, seed, victim)
                craft_universal(attack, victim, images, epsilon, seed, one.size, file, plan.device, bars)


def attack_file(plan: Plan, attack: str, epsilon: float, seed: int, victim: nn.Module, *images: NDArray[np.uint8]) -> Path:
    """Where an attack on the public victim is kept: a perturbation for all images, or `images` attacked one by one."""
    made_of = fingerprint(victim, *images) if images else f"{fingerprint(victim)}-{plan.attackers}"
    folder = f"{plan.origin.size}-{made_of}-{code_of('hardening.attacks')}"
    return plan.out / "attacks" / folder / f"{attack}-{epsilon:g}-{seed}.npz"


def train_defence(plan: Plan, name: str, root: Path, baseline: str, *, bars: Bars) -> None:
    """Train a baseline's encoder, once for all tasks, on the images in `root` that the bundle's were tuned on."""
    bundle = load_bundle(plan.bundle)
    dataset = read_images(root, bundle.manifest, plan.out / "data" / name, bars)
    file = baseline_file(plan, baseline)
    train_baseline(baseline, bundle, dataset, file, seed=plan.seeds[0], size=plan.origin.size, device=plan.device, bars=bars)


def baseline_file(plan: Plan, baseline: str) -> Path:
    """Where a baseline's encoder is kept; the first seed is that of its training."""
    made_from = f"{plan.origin.digest[:8]}-{plan.attackers[:8]}-{code_of('hardening.baselines')}"
    return plan.out / "baselines" / f"{plan.origin.folder}-{made_from}-{plan.origin.size}-{baseline}-{plan.seeds[0]}.pt"


def measure_task(plan: Plan, name: str, root: Images, victim: nn.Module | None = None, *, bars: Bars) -> None:
    """Measure every cell of one task that is not on disk yet; `victim` is needed where the bundle has no tripwire.

    RecipeError where the images have no classes and something is asked for that reads classifier heads.
    """
    size = plan.size
    bundle = load_bundle(plan.bundle)
    graph = Graph(bundle.model, victim).to(plan.device)
    task = load_task(name, root, graph, bundle.manifest, size, plan.out / "data" / name, plan.device, bars)
    if task.victim_head is None and (plan.knowing or plan.rivals or plan.convergence):
        raise RecipeError(f"{name}: adaptive attacks, other detectors and convergence need labelled images, train/<class>/*")
    room = _Room(plan, size, bundle, graph, task, bars)
    once(room.file(CLEAN), room.clean)
    cells = [(a, e, s) for a in plan.attacks for e in plan.epsilons for s in plan.seeds]
    rivals = fit_rivals(task, room.before, room.victim, plan.device, plan.rivals)
    with bars.task(f"{name}: attacks on the public victim", len(cells)) as progress:
        for attack, epsilon, seed in cells:
            once(room.file(attack, epsilon, seed), partial(room.oblivious, attack, epsilon, seed))
            if rivals:
                once(room.file(f"rivals {attack}", epsilon, seed), partial(room.rivals, rivals, attack, epsilon, seed))
            progress.advance(1, f"{attack} eps {epsilon:g} seed {seed}")
    for attack in (a for a in plan.attacks if plan.convergence and a != NOISE):
        once(room.file(f"convergence {attack}", plan.epsilons[0], plan.seeds[0]), partial(room.convergence, attack))
    room.measure_baselines(cells)
    if not plan.knowing:
        return
    known = []
    for place in plan.surrogates:  # all of them read before the first attack, which takes long
        other = load_bundle(place)
        theirs = Graph(other.model).to(plan.device)
        # The attacker's own heads, on his own branches.
        folder = plan.out / "data" / name
        heads = load_task(name, root, theirs, other.manifest, size, folder, plan.device, bars)
        known.append(_Known(theirs, other, heads))
    room.attack_knowing("white box", [_Known(graph, bundle, task)])
    if known:
        room.attack_knowing("grey box" if len(known) == 1 else f"grey box of {len(known)}", known)


@dataclass(frozen=True)
class _Known:
    """What an attacker aims at who knows the method: the bundle itself, or one of those that he made by it."""

    graph: Graph
    bundle: Bundle
    task: Task


@dataclass(frozen=True)
class _Near:
    """What the nearest clean images say of some images."""

    right: NDArray[np.bool_]
    """[N]: whether most of them have the true class."""
    quality: dict[str, float]


class _Room:
    """One task of one bundle, and everything that is computed once for it."""

    def __init__(self, plan: Plan, size: Size, bundle: Bundle, graph: Graph, task: Task, bars: Bars) -> None:
        self.plan, self.size, self.bundle, self.graph, self.task, self.bars = plan, size, bundle, graph, task, bars
        self.manifest = bundle.manifest
        self.before = self.values(task.images, "clean test images")
        self.predicted = task.predictions(self.before, self.manifest)
        self.victim = graph.encoder(TRIPWIRE)
        self.near = self.neighbours(self.before, task.labels)

    def file(self, attack: str, epsilon: float = 0, seed: int = 0) -> Path:
        """The cell's file."""
        folder = self.plan.out / "records" / self.plan.origin.folder / self.task.name
        return folder / f"{attack.replace(' ', '-')}-{epsilon:g}-{seed}.jsonl"

    def values(self, images: NDArray[np.uint8], what: str) -> dict[str, Tensor]:
        return graph_values(self.graph, images, self.plan.device, self.bars, f"{self.task.name}: {what}")

    def clean(self) -> list[Record]:
        """Accuracy without an attack, false alarms as it is calibrated and on its own domain, honest changes."""
        task, records = self.task, []
        values, more = self.values(task.clean_images, "more clean test images"), len(task.clean_images)

        def add(metric: str, subject: str, value: Any, attack: str = CLEAN, n: int = len(task.images)) -> None:
            records.append(self.plan.origin.record(metric, subject, task.name, attack, value, n))

        for system, predicted in task.predictions(values, self.manifest).items():
            add("clean_acc", system, float((predicted == task.clean_labels).mean()), n=more)
        for subject, near in self.near.items():
            for metric, value in near.quality.items():
                add(metric, subject, value)
        add("scores", "detector", [round(float(score), 4) for score in self.before["score"]])
        tables = _tables(self.manifest, task)
        for name, table in tables.items():
            for budget, value in flagged(table, values["score"].numpy()).items():
                add(f"fpr@{budget:g}", name, value, n=more)
        for change, images in honest_changes(task.small_images, 0, self.manifest.pixels).items():
            score = self.values(images, change)["score"].numpy()
            for name, table in tables.items():
                for budget, value in flagged(table, score).items():
                    add(f"fpr@{budget:g}", name, value, f"change: {change}")
        return records

    def oblivious(self, attack: str, epsilon: float, seed: int) -> list[Record]:
        """An attack that knows the public victim only."""
        attacked = self.attacked(attack, epsilon, seed)
        _save_examples(self.plan.out / "examples" / self.task.name / f"{attack}-{epsilon:g}.png", self.task.images, attacked)
        return self.judged(attack, epsilon, seed, attacked, np.arange(len(attacked)))

    def convergence(self, attack: str) -> list[Record]:
        """What an attack does to the undefended victim with more and more effort."""
        plan, task, head = self.plan, self.task, self.task.victim_head
        assert head is not None  # checked for the plan
        epsilon, seed, before, records = plan.epsilons[0], plan.seeds[0], self.predicted[UNDEFENDED], []
        for share in (*LESS_EFFORT, 1):
            attacked = self.attacked(attack, epsilon, seed, share)
            with torch.no_grad():
                found = head(features(self.victim, attacked, device=plan.device)).argmax(dim=1).numpy()
            rate = float((found != before).mean())
            metric = f"fooling_rate@effort {share:g}"
            records.append(plan.origin.record(metric, UNDEFENDED, task.name, attack, rate, len(attacked), epsilon, seed))
        return records

    def attacked(self, attack: str, epsilon: float, seed: int, share: float = 1) -> NDArray[np.uint8]:
        """The test images [N, H, W, 3] under an attack on the public victim, made with a share of its effort."""
        plan, task, common = with_effort(self.plan, share), self.task, (attack, epsilon, seed)
        if attack in UNIVERSAL:
            return load_universal(attack_file(plan, *common, self.victim))(task.images)

        def make() -> dict[str, NDArray[np.uint8]]:
            found = craft(attack, self.victim, task.images, task.targets, epsilon, seed, plan.size, plan.device, self.bars)
            return {"attacked": found}

        return kept(attack_file(plan, *common, self.victim, task.images, task.targets), make)["attacked"]

    def rivals(self, rivals: list[Rival], attack: str, epsilon: float, seed: int) -> list[Record]:
        """What other detectors make of the same attacked images."""
        attacked = self.attacked(attack, epsilon, seed)
        values = self.values(attacked, f"{attack}, eps {epsilon:g}")
        records = []
        for rival in rivals:
            clean, score = rival.clean, rival.score(attacked, values)

            def add(metric: str, value: float, n: int, name: str = rival.name) -> None:
                records.append(self.plan.origin.record(metric, name, self.task.name, attack, value, n, epsilon, seed))

            truth = np.repeat([0, 1], [len(clean), len(score)])
            add("auroc", float(roc_auc_score(truth, np.concatenate([clean, score]))), len(truth))
            for budget, value in flagged(rival.table, score).items():
                add(f"tpr@{budget:g}", value, len(score))
        return records

    def measure_baselines(self, cells: list[tuple[str, float, int]]) -> None:
        """Baseline defences under the same attacks on the public victim, each in files of its own."""
        plan, task, trained = self.plan, self.task, self.plan.seeds[0]
        every = [(CLEAN, 0.0, trained), *cells]
        if HEAD_AWARE in plan.knowing:
            every += [(_BASELINE_KNOWN, e, s) for e in plan.epsilons for s in plan.seeds]
        fitted = [
            fit_baseline(name, baseline_file(plan, name), self.bundle, task, plan.device)
            for name in plan.baselines
            if not all(self.file(f"{name} {attack}", epsilon, seed).exists() for attack, epsilon, seed in every)
        ]
        if not fitted:
            return
        with self.bars.task(f"{task.name}: other defences", len(every)) as progress:
            for attack, epsilon, seed in every:
                missing = [b for b in fitted if not self.file(f"{b.name} {attack}", epsilon, seed).exists()]
                images = task.clean_images
                if missing and attack not in (CLEAN, _BASELINE_KNOWN):
                    images = self.attacked(attack, epsilon, seed)
                for baseline in missing:
                    file = self.file(f"{baseline.name} {attack}", epsilon, seed)
                    once(file, partial(self.baseline, baseline, attack, epsilon, seed, images))
                progress.advance(1, f"{attack} eps {epsilon:g} seed {seed}")

    def baseline(self, baseline: Baseline, attack: str, epsilon: float, seed: int, images: NDArray[np.uint8]) -> list[Record]:
        """A baseline's accuracy on images [N, H, W, 3]: clean ones, attacked ones, or ones to be attacked through it."""
        labels, before = self.task.labels, baseline.before
        if attack == CLEAN:
            labels = self.task.clean_labels
        if attack == _BASELINE_KNOWN:
            few = spread(len(labels), self.size.adaptive_images)
            labels, before = labels[few], before[few]
            images = self.attacked_knowing(HEAD_AWARE, baseline.target(), epsilon, seed, few)
        predicted = baseline.predict(images)
        if attack == CLEAN:
            found = {"clean_acc": float((predicted == labels).mean())}
        else:
            found = under_attack(predicted, before, labels)
        return [
            self.plan.origin.record(metric, baseline.system, self.task.name, attack, value, len(labels), epsilon, seed)
            for metric, value in found.items()
        ]

    def attack_knowing(self, box: str, known: list[_Known]) -> None:
        """The adaptive suite, aimed at all of `known` together; measured on the bundle itself."""
        plan = self.plan
        cells = [(a, e, s) for a in plan.knowing for e in plan.epsilons for s in plan.seeds]
        if plan.convergence:
            less = [fewer_steps(a, self.size.adaptive_steps, share) for share in LESS_EFFORT for a in plan.knowing]
            cells = list(dict.fromkeys([*cells, *((a, plan.epsilons[0], plan.seeds[0]) for a in less)]))
        # Another surrogate's numbers are others; the report shows their mean and spread.
        cell = " ".join((box, *(one.bundle.manifest.digest[:8] for one in known if one.bundle is not self.bundle)))
        with self.bars.task(f"{self.task.name}: {box}", len(cells)) as progress:
            for attack, epsilon, seed in cells:
                file = self.file(f"{cell} {attack}", epsilon, seed)
                once(file, partial(self.knowing, box, known, attack, epsilon, seed))
                progress.advance(1, f"{attack} eps {epsilon:g} seed {seed}")

    def knowing(self, box: str, known: list[_Known], attack: str, epsilon: float, seed: int) -> list[Record]:
        """One attack of the adaptive suite, on some images of the task."""
        few = spread(len(self.task.images), self.size.adaptive_images)
        target = Target.together([target_of(one.graph, one.task, one.bundle.manifest, attack) for one in known])
        return self.judged(f"{box} {attack}", epsilon, seed, self.attacked_knowing(attack, target, epsilon, seed, few), few)

    def attacked_knowing(
        self, attack: str, target: Target, epsilon: float, seed: int, few: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Some of the test images, `few` [N], under an attack of the adaptive suite."""
        return attack_knowing(
            attack,
            target,
            self.task.images[few],
            self.task.labels[few],
            epsilon=epsilon,
            steps=self.size.adaptive_steps,
            restarts=self.size.adaptive_restarts,
            seed=seed,
            device=self.plan.device,
            bars=self.bars,
        )

    def judged(
        self, attack: str, epsilon: float, seed: int, attacked: NDArray[np.uint8], chosen: NDArray[np.int64]
    ) -> list[Record]:
        """All numbers of one attack on some of the test images, `chosen` [N]."""
        task, records = self.task, []
        labels = task.labels[chosen]
        values = self.values(attacked, f"{attack}, eps {epsilon:g}")
        predicted = task.predictions(values, self.manifest)
        before = {system: found[chosen] for system, found in self.predicted.items()}

        def add(metric: str, subject: str, value: Any, n: int = len(labels)) -> None:
            records.append(self.plan.origin.record(metric, subject, task.name, attack, value, n, epsilon, seed))

        for system, found in predicted.items():
            for metric, value in under_attack(found, before[system], labels).items():
                add(metric, system, value)
        near = self.neighbours(values, labels)
        for subject, there in near.items():
            for metric, value in there.quality.items():
                add(metric, subject, value)
        clean_score, score = self.before["score"][chosen].numpy(), values["score"].numpy()
        truth = np.repeat([0, 1], [len(clean_score), len(score)])
        add("auroc", "detector", float(roc_auc_score(truth, np.concatenate([clean_score, score]))), len(truth))
        add("scores", "detector", [round(float(s), 4) for s in score])
        fooled = predicted[UNDEFENDED] != before[UNDEFENDED] if UNDEFENDED in predicted else np.zeros(len(labels), bool)
        right = before[GUARDED] == labels if task.victim_head is not None else np.zeros(len(labels), bool)
        for name, table in _tables(self.manifest, task).items():
            p = table.p_value(score)
            for budget in BUDGETS:
                if budget < table.smallest_budget:
                    continue
                add(f"tpr@{budget:g}", name, float((p <= budget).mean()))
                if fooled.any():
                    add(f"tpr_fooled@{budget:g}", name, float((p[fooled] <= budget).mean()), int(fooled.sum()))
                # SR@N of Bryniarski et al. 2021: of the images that were right, those now wrong and not flagged.
                if right.any():
                    broken = right & (predicted[GUARDED] != labels) & (p > budget)
                    add(f"success@{budget:g}", name, float(broken.sum() / right.sum()), int(right.sum()))
                    add(f"broken@{budget:g}", name, [float(one) for one in broken[right]], int(right.sum()))
                # The same of the returned embedding, for who has no classifier: the neighbours' class.
                if near and (known := self.near[RETURNED].right[chosen]).any():
                    lost = known & ~near[RETURNED].right & (p > budget)
                    add(f"knn_success@{budget:g}", name, float(lost.sum() / known.sum()), int(known.sum()))
        return records

    def neighbours(self, values: Mapping[str, Tensor], labels: NDArray[np.int64]) -> dict[str, _Near]:
        """By embedding, kNN accuracy and recall@10 against the clean gallery; the victim's features are centred there too."""
        task = self.task
        if task.victim_head is None:
            return {}
        centre = task.gallery[TRIPWIRE].mean(dim=0)
        pairs = {
            RETURNED: (task.gallery["embedding"], values["embedding"]),
            UNDEFENDED: (task.gallery[TRIPWIRE] - centre, values[TRIPWIRE] - centre),
        }
        found = {}
        for subject, (gallery, queries) in pairs.items():
            right = knn_predict(gallery, task.gallery_labels, queries, NEIGHBOURS) == labels
            similar = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
            nearest = task.gallery_labels[similar.topk(min(_RECALL_AT, len(gallery)), dim=1).indices.numpy()]
            recalled = (nearest == labels[:, None]).any(axis=1)
            quality = {"knn_acc": float(right.mean()), f"recall@{_RECALL_AT}": float(recalled.mean())}
            found[subject] = _Near(right, quality)
        return found


def _tables(manifest: Manifest, task: Task) -> dict[str, Calibration]:
    """The tables that tell what is flagged, by name in the records."""
    own = {} if task.own_calibration is None else {"recalibrated": task.own_calibration}
    return {"bundle's calibration": manifest.calibration, **own}


def under_attack(found: NDArray[np.int64], before: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    """What an attack did to a system: classes [N] predicted of attacked images and, `before`, of clean ones; true [N]."""
    robust, clean = float((found == labels).mean()), float((before == labels).mean())
    rates = {"robust_acc": robust, "fooling_rate": float((found != before).mean())}
    return {**rates, "robust/clean": robust / clean} if clean else rates


def flagged(table: Calibration, score: NDArray[Any]) -> dict[float, float]:
    """Share of images flagged, by budget that the table supports."""
    p = table.p_value(score)
    return {budget: float((p <= budget).mean()) for budget in BUDGETS if budget >= table.smallest_budget}


def _save_examples(file: Path, clean: NDArray[np.uint8], attacked: NDArray[np.uint8]) -> None:
    """Rows of clean, attacked and difference (x 10, around grey), four images wide."""
    if file.exists():
        return
    picked = spread(len(clean), _EXAMPLES)
    difference = np.clip(128 + 10 * (attacked[picked].astype(int) - clean[picked]), 0, 255).astype(np.uint8)
    rows = [np.concatenate(list(images), axis=1) for images in (clean[picked], attacked[picked], difference)]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(file)
