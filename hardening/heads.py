"""Task heads: classifiers on a bundle's frozen branches, trained from a labelled folder, without torch.

Each branch of the embedding gets a linear head, fitted alone as `branches.train_head` does; their fusion and the last softmax
are part of one small ONNX graph. `rfdm` is the paper's fusion (ZePAD section 3): a sum of logits, each weighted by its head's
certainty. `guarded`, the default, adds up votes that are bounded, so that no branch decides alone, and takes half of the vote
from a branch that its own evidence speaks against (`branches.guarded_vote`). How sharp each head's probabilities are is
fitted on held-out folds: by what the heads add to each other there (stacking: Wolpert 1992, Breiman 1996). Branches also err
together, so added votes are too sure of themselves; a temperature of the fusion, fitted on the same folds (Guo et al. 2017),
makes its probabilities as large as they are right.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import cross_val_predict

from model_store.bundle import Bundle
from model_store.choices import Fusion
from model_store.errors import TwogateError
from model_store.folder import Answers, answer_files, class_names, files_below, name_of
from model_store.manifest import NAME_PATTERN, Manifest, Task, task_file
from model_store.revise import OWN_STORE, revise
from model_store.session import GateSession
from model_store.store import try_store
from model_store.tasks import TaskHead, check_head

RFDM_K = 3.0
VOTE_FLOOR = 0.3
"""Times chance, added to every probability in a vote: no branch can speak against a class by more than its logarithm."""
GUARD_FLOOR, GUARD_LEAST = 0.03, 0.5
"""Below this p-value a branch's vote shrinks, down to this share. A bounded vote shouts nobody down, so half of it is enough
to take: what makes a hardened branch look strange seldom makes it wrong."""
_TOWARDS_1 = 0.01
_STEPS = 300
VALIDATION_SHARE = 0.15
FOLDS = 3
SEEN = (
    "The classes are those of the images that the bundle was hardened on. Where these are the same images, the encoders know "
    "them: the head learns from features that are better than those of new images, and the validation accuracy is too good. "
    "Train on images that `twogate harden` did not get."
)
MIN_PER_CLASS = 5
"""One to validate on, and more than one a fold to train on."""
_OPSET, _IR = 17, 8  # old enough for every host that runs the main graph


class HeadError(TwogateError):
    """No head can be trained from this."""


@dataclass(frozen=True)
class Linear:
    """A branch's head on its slice of the embedding: logits [N, C] = slice @ weight + bias."""

    branch: str
    start: int
    """First column of the slice in the embedding."""
    weight: NDArray[np.float64]
    """[d, C], standardisation folded in."""
    bias: NDArray[np.float64]
    """[C]"""
    scale: float = 1.0
    """What the guarded fusion multiplies its logits by, before their softmax."""


@dataclass(frozen=True)
class Labelled:
    """A labelled folder: classes, and (file, class index) of its images."""

    classes: tuple[str, ...]
    train: tuple[tuple[Path, int], ...]
    test: tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class Trained:
    """What became of it."""

    place: Path
    """The folder of the new version."""
    task: Task
    skipped: tuple[tuple[Path, str], ...]
    copies: int
    """Files that were left out, being the same as another one."""
    seen: bool
    """Whether its classes are those of the data that the bundle was hardened on."""


def add_head(
    bundle: Bundle,
    store: Path,
    name: str,
    folder: Path,
    *,
    fusion: Fusion = "guarded",
    seed: int = 0,
    only_newest: bool = False,
    threads: int = 1,
    begin: Callable[[int], None] = lambda files: None,
    advance: Callable[[], None] = lambda: None,
) -> Trained:
    """Train a head for the task `name` on a labelled folder, and publish `bundle` with it in `store` as a new version.

    15% of the images of each class are held out and give the validation accuracy; `test/`, where there is one, gives a
    number too and chooses nothing. Copies of a file count as one image, of the first class and split that have it. A head of
    the same name is replaced. `begin` is told the number of files, `advance` is called once for each. HeadError, FolderError,
    BundleError or StoreError (see `revise`, which knows `only_newest`) say what is wrong, and then nothing is published.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise HeadError(f"{name!r} cannot be a task's name: up to 64 of a-z 0-9 . _ -, beginning with a letter or digit")
    manifest = bundle.manifest
    data = labelled(folder)
    files = [*data.train, *data.test]
    _check_counts(np.array([label for _, label in data.train]), data.classes, "files")  # before all are embedded
    try_store(store, manifest.name, OWN_STORE)
    begin(len(files))
    session = GateSession(bundle, threads=threads)
    paths = [path for path, _ in files]
    answers = answer_files(session, manifest.pixels, paths, threads=threads, advance=advance)
    label_of = dict(files)
    labels = np.array([label_of[path] for path in answers.paths], dtype=np.int64)
    testing = {path for path, _ in data.test}
    # Of a picture under many names, one in the hold-out would know the answer for another one in training.
    first = _first_of_each(answers, labels, data.classes)
    test = np.array([path in testing for path in answers.paths]) & first
    usable = first & ~test
    _check_counts(labels[usable], data.classes, "different usable images")
    train, validation = hold_out(labels, usable, seed)
    heads, held_out = _trained(manifest, answers.embedding[train], labels[train], len(data.classes))
    graph = head_graph(manifest, heads, fusion, _sharpness(held_out, labels[train], heads, fusion))
    where = name_of(folder)
    task = Task(
        name=name,
        classes=data.classes,
        file=task_file(name),
        fusion=fusion,
        trained_on=f"{len(train)} images of {len(data.classes)} classes, the folder {where}",
    )
    head = TaskHead(manifest, task, graph)
    check_head(head, manifest)
    metrics = {"validation_clean_acc": _accuracy(head, answers, labels, validation)}
    if test.any():
        metrics["test_clean_acc"] = _accuracy(head, answers, labels, np.flatnonzero(test))
    task = task.model_copy(update={"metrics": metrics})
    counts = {"train": len(train), "validation": len(validation), "test": int(test.sum())}
    record = {
        "task": name,
        "images": counts,
        "skipped": len(answers.skipped),
        "copies": int((~first).sum()),
        "sha256": answers.digest,
        "seed": seed,
        "libraries": {library: importlib.metadata.version(library) for library in ("scikit-learn", "onnx", "numpy")},
    }
    seen = sorted(data.classes) == sorted(manifest.provenance.get("data", {}).get("classes", ()))
    place = revise(
        bundle,
        store,
        fields={"tasks": (*(one for one in manifest.tasks if one.name != name), task)},
        files={task.file: graph},
        card=_card(bundle, task, counts, where) + (f"\n\n{SEEN}" if seen else ""),
        record=record,
        only_newest=only_newest,
    )
    return Trained(place, task, answers.skipped, int((~first).sum()), seen)


def labelled(folder: Path) -> Labelled:
    """What `train/<class>/*` (or `<class>/*`) and `test/<class>/*` hold. HeadError says what is missing."""

    def classes_in(place: Path) -> list[str]:
        if not place.is_dir():
            return []
        return sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    root = folder / "train" if (folder / "train").is_dir() else folder
    testing = classes_in(folder / "test")
    # Beside classes, the folders of other commands are none.
    classes = [name for name in classes_in(root) if not (root == folder and name in ("test", "calibration"))]
    if len(classes) < 2:
        found = f"only {classes[0]}" if classes else "none"
        raise HeadError(f"{root} must hold two or more folders of images, one a class; it has {found}")
    class_names([*classes, *testing])
    strangers = sorted(set(testing) - set(classes))
    if strangers:
        raise HeadError(f"{folder / 'test'} has the class {strangers[0]!r}, which there are no images to train on for")

    def images(place: Path, names: Sequence[str]) -> tuple[tuple[Path, int], ...]:
        return tuple((file, classes.index(name)) for name in names for file in files_below(place / name))

    return Labelled(tuple(classes), images(root, classes), images(folder / "test", testing))


def hold_out(labels: NDArray[np.int64], usable: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (train, validation) of the usable images; 15% of each class are held out, at least one."""
    rng = np.random.default_rng(seed)
    train: list[int] = []
    validation: list[int] = []
    for label in np.unique(labels[usable]):
        members = rng.permutation(np.flatnonzero(usable & (labels == label)))
        held = max(1, round(VALIDATION_SHARE * len(members)))
        validation.extend(members[:held].tolist())
        train.extend(members[held:].tolist())
    return np.array(sorted(train), dtype=np.int64), np.array(sorted(validation), dtype=np.int64)


def train_heads(manifest: Manifest, embedding: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> list[Linear]:
    """A linear head for each MPAE and BMP branch, fitted on its slice of embeddings [N, D] with labels [N] in 0..C-1.

    A head reads its branch's features; or the early stages too; or the layout as well: what its folds found best. Traffic
    signs want the layout, a hundred classes with few images each are learned worse with it.
    """
    return _trained(manifest, embedding, labels, classes)[0]


def _trained(
    manifest: Manifest, embedding: NDArray[np.float32], labels: NDArray[np.int64], classes: int
) -> tuple[list[Linear], NDArray[np.float64]]:
    """`train_heads`, and the logits [N, B, C] of such heads for the folds that they were not fitted on."""
    parts = [branch for branch in manifest.branches if branch.embedding_dim]
    # The embedding is the unit-length features side by side, divided by this.
    root = math.sqrt(len(parts))
    heads, held_out, start = [], [], 0
    for branch in parts:
        end = start + branch.embedding_dim
        if branch.role != "tripwire":
            columns = embedding[:, start:end].astype(np.float64) * root
            prefixes = np.cumsum(branch.parts or (branch.embedding_dim,)).tolist()
            best = max((_fit(columns[:, :width], labels, classes) for width in prefixes), key=lambda fitted: fitted.quality)
            heads.append(Linear(branch.name, start, best.weight * root, best.bias))
            held_out.append(best.held_out(columns, labels))
        start = end
    logits = np.stack(held_out, axis=1)
    scales = _stack(logits, labels)
    return [replace(head, scale=scale) for head, scale in zip(heads, scales, strict=True)], logits


def head_graph(manifest: Manifest, heads: Sequence[Linear], fusion: Fusion, sharpness: float = 1.0) -> bytes:
    """The graph of the contract: embedding [N, D] and confidence [N, B] in, probabilities [N, C] out.

    `sharpness`, one over a temperature, multiplies the fused votes before the last softmax.
    """
    names = [branch.name for branch in manifest.branches]
    classes = heads[0].weight.shape[1]
    constants: dict[str, NDArray[Any]] = {
        "columns": np.array([1], np.int64),
        "last": np.array([2], np.int64),
    }
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))

    for head in heads:
        b = head.branch
        constants[f"{b}_weight"] = head.weight.astype(np.float32)
        constants[f"{b}_bias"] = head.bias.astype(np.float32)
        constants[f"{b}_start"] = np.array([head.start], np.int64)
        constants[f"{b}_end"] = np.array([head.start + len(head.weight)], np.int64)
        node("Slice", ["embedding", f"{b}_start", f"{b}_end", "columns"], f"{b}_features")
        node("Gemm", [f"{b}_features", f"{b}_weight", f"{b}_bias"], f"{b}_logits")
        constants[f"{b}_scale"] = np.array(head.scale if fusion == "guarded" else 1, np.float32)
        node("Mul", [f"{b}_logits", f"{b}_scale"], f"{b}_scaled")
        node("Unsqueeze", [f"{b}_scaled", "columns"], f"{b}_row")
    node("Concat", [f"{head.branch}_row" for head in heads], "logits", axis=1)
    node("Softmax", ["logits"], "branch_probabilities", axis=2)
    if fusion == "rfdm":
        # c = m exp(k (m - 1/2)), with m the largest probability of each branch; scaled to sum to 1.
        constants["half"], constants["steepness"] = np.array(0.5, np.float32), np.array(RFDM_K, np.float32)
        node("ReduceMax", ["branch_probabilities"], "certainty", axes=[2], keepdims=0)
        node("Sub", ["certainty", "half"], "centred")
        node("Mul", ["centred", "steepness"], "exponent")
        node("Exp", ["exponent"], "boost")
        node("Mul", ["certainty", "boost"], "weight")
        node("ReduceSum", ["weight", "columns"], "weights", keepdims=1)
        node("Div", ["weight", "weights"], "share")
        node("Identity", ["logits"], "vote")
    else:
        constants["voters"] = np.array([names.index(head.branch) for head in heads], np.int64)
        constants["guard_floor"] = np.array(GUARD_FLOOR, np.float32)
        constants["vote_floor"] = np.array(VOTE_FLOOR / classes, np.float32)
        constants["least"], constants["most"] = np.array(GUARD_LEAST, np.float32), np.array(1, np.float32)
        node("Gather", ["confidence", "voters"], "trust", axis=1)
        node("Div", ["trust", "guard_floor"], "relative")
        node("Clip", ["relative", "least", "most"], "share")
        node("Add", ["branch_probabilities", "vote_floor"], "bounded")
        node("Log", ["bounded"], "vote")
    node("Unsqueeze", ["share", "last"], "share_column")
    node("Mul", ["vote", "share_column"], "weighted")
    node("ReduceSum", ["weighted", "columns"], "fused", keepdims=0)
    constants["sharpness"] = np.array(sharpness, np.float32)
    node("Mul", ["fused", "sharpness"], "sharpened")
    node("Softmax", ["sharpened"], "probabilities", axis=1)
    graph = helper.make_graph(
        nodes,
        "task",
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", manifest.embedding_dim]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["N", len(names)]),
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@dataclass(frozen=True)
class _Fitted:
    weight: NDArray[np.float64]
    """[d, C]"""
    bias: NDArray[np.float64]
    """[C]"""
    quality: float
    """Mean log-likelihood of the held-out folds at the chosen penalty."""
    penalty: float
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]

    def held_out(self, features: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits [N, C] of features [N, d or more], each by a head that was fitted alike on the other folds."""
        x = (features[:, : len(self.mean)] - self.mean) / self.spread
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=self.penalty, max_iter=_STEPS)
            found = cross_val_predict(model, x, labels, cv=FOLDS, method="decision_function")
        return _both(found)


def _stack(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> list[float]:
    """Scales of B heads, of their held-out logits [N, B, C]: those by which the mean of the scaled logits is the likeliest.

    Drawn towards 1, so that a head that adds little today still has a voice when another one is attacked.
    """

    def loss(logarithms: NDArray[np.float64]) -> float:
        fused = np.einsum("nbc,b->nc", logits, np.exp(logarithms)) / logits.shape[1]
        likelihood = fused[np.arange(len(labels)), labels] - logsumexp(fused, axis=1)
        return float(_TOWARDS_1 * np.square(logarithms).sum() - likelihood.mean())

    return [float(scale) for scale in np.exp(minimize(loss, np.zeros(logits.shape[1]), method="L-BFGS-B").x)]


def _sharpness(logits: NDArray[np.float64], labels: NDArray[np.int64], heads: Sequence[Linear], fusion: Fusion) -> float:
    """The likeliest factor of the fused votes, of held-out logits [N, B, C]; every branch is trusted, as on clean images."""
    if fusion == "rfdm":
        certainty = softmax(logits, axis=2).max(axis=2)
        weight = certainty * np.exp(RFDM_K * (certainty - 0.5))
        votes = np.einsum("nbc,nb->nc", logits, weight / weight.sum(axis=1, keepdims=True))
    else:
        scaled = logits * np.array([head.scale for head in heads])[:, None]
        votes = np.log(softmax(scaled, axis=2) + VOTE_FLOOR / logits.shape[2]).sum(axis=1)

    def loss(logarithm: float) -> float:
        likelihood = log_softmax(np.exp(logarithm) * votes, axis=1)[np.arange(len(labels)), labels]
        # Drawn towards 1, or folds without an error would make it as large as it may be.
        return float(_TOWARDS_1 * logarithm**2 - likelihood.mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def _both(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """scikit-learn keeps one column for two classes."""
    return np.stack([-values, values], axis=1) / 2 if values.ndim == 1 else values


def _fit(features: NDArray[np.float64], labels: NDArray[np.int64], classes: int) -> _Fitted:
    """Fitted on raw features [N, d]: multinomial logistic regression, its penalty chosen by three folds."""
    mean, scale = features.mean(axis=0), features.std(axis=0, ddof=1)
    # A channel that hardly moves is not blown up.
    scale = np.maximum(scale, max(0.1 * float(scale.mean()), 1e-6))
    model = LogisticRegressionCV(
        Cs=[1e-3, 1e-2, 1e-1, 1.0],
        cv=FOLDS,
        scoring="neg_log_loss",
        max_iter=_STEPS,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        # A weak penalty may want more steps; the folds judge what came out of these.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - mean) / scale, labels)
    weight, bias = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
    if classes == 2:
        weight, bias = _both(weight[0]).T, _both(bias)[0]
    weight = weight / scale
    quality = float(np.mean(model.scores_, axis=0).max())
    return _Fitted(weight.T, bias - weight @ mean, quality, float(np.ravel(model.C_)[0]), mean, scale)


def _first_of_each(answers: Answers, labels: NDArray[np.int64], classes: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which of N images are no copy of an earlier one [N]. HeadError where one picture has two labels."""
    found: dict[str, int] = {}
    for number, digest in enumerate(answers.files):
        first = found.setdefault(digest, number)
        if labels[first] != labels[number]:
            raise HeadError(
                f"{answers.paths[number]} is the same picture as {answers.paths[first]}, and cannot be both "
                f"{classes[labels[number]]!r} and {classes[labels[first]]!r}: remove one of them"
            )
    first_of_each = np.zeros(len(labels), bool)
    first_of_each[list(found.values())] = True
    return first_of_each


def _check_counts(labels: NDArray[np.int64], classes: tuple[str, ...], what: str) -> None:
    for label, name in enumerate(classes):
        count = int((labels == label).sum())
        if count < MIN_PER_CLASS:
            raise HeadError(f"the class {name!r} has {count} {what} and needs at least {MIN_PER_CLASS}")


def _accuracy(head: TaskHead, answers: Answers, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> float:
    found = head.run(answers.embedding[rows], answers.confidence[rows]).argmax(axis=1)
    return float((found == labels[rows]).mean())


def _card(bundle: Bundle, task: Task, counts: dict[str, int], where: str) -> str:
    lines = [
        f"## Task {task.name}",
        "",
        f"A head for {len(task.classes)} classes, added to {bundle.label}; the graph is the same. Trained on {where}, "
        f"fusion {task.fusion}.",
        "",
        "| clean accuracy on | images | % |",
        "| --- | --- | --- |",
    ]
    for metric, value in task.metrics.items():
        split = metric.partition("_")[0]
        lines.append(f"| {split} | {counts[split]} | {100 * value:.1f} |")
    return "\n".join([*lines, "", "Accuracy under attack was not measured here."])
