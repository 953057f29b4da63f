"""A score-based black box (T7, docs/measure.md) against a running service: all that the attacker has is its answers.

He sees the returned embedding and the score of every picture that he posts, and knows the bundle's threshold at 5 %, which
the p-values give away. First he posts labelled pictures of his own and fits a head to the embeddings that come back. What
he lowers is the margin by which this head finds the true class, plus what the score is above the threshold: an app's head
has learned from the same embeddings, so that what fools one tends to fool the other. He is told when he has won, as by
watching the app behind the service, and stops there: a class that was right is wrong, by the guarded heads of the task, and
the picture is not flagged at 5 %.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hardening.attacks.blackbox import Found, nes, square
from hardening.branches import Head, train_head
from hardening.data import spread
from hardening.graph import Graph
from hardening.measure.knowing import AIMED_AT_FPR
from hardening.measure.live import LiveService
from hardening.measure.photographs import RETURNED, SERVICE
from hardening.measure.records import Origin, Record, once
from hardening.measure.sizes import SIZES
from hardening.measure.tasks import GUARDED, attackers_images, graph_values, load_task
from hardening.progress import Bars
from model_store.bundle import Bundle
from model_store.errors import TwogateError

SEARCHES: dict[str, Callable[..., Found]] = {"square": square, "nes": nes}
SUCCESS = f"success@{AIMED_AT_FPR:g}"
NOTICED = f"queries_flagged@{AIMED_AT_FPR:g}"
QUERIES = "median_queries"
_POSTED = 64
"""Of the attacker's own pictures at a time."""
READING = """\
The attacker sees the returned embedding and the score of what he posts, no more. Before, he has posted labelled pictures
of his own (64, 1000 or 10000, by the size) and fitted a head to their embeddings, whose margin he follows. Success: of
the images that the guarded heads of the task classified right, those that he made wrong and that were not flagged at
0.05. He is told when he has won and stops there; the median is over those. Queries flagged: of all that he posted against
them. The cosine is that of the returned embedding of his best picture to the clean one."""


def measure_querying(
    bundle: Bundle,
    service: LiveService,
    name: str,
    root: Path,
    out: Path,
    folder: Path,
    origin: Origin,
    *,
    searches: Sequence[str],
    queries: int,
    epsilon: float,
    size: str,
    seed: int,
    device: str,
    bars: Bars,
) -> None:
    """Measure each search that is not in `folder` yet, on images of a task that are classified right.

    TwogateError where its images have no classes.
    """
    graph, manifest = Graph(bundle.model).to(device), bundle.manifest
    task = load_task(name, root, graph, manifest, SIZES[size], out / "data" / name, device, bars)

    if task.victim_head is None:
        raise TwogateError(
            f"{root}: a black box breaks classifications, so images need classes: train/<class>/*, test/<class>/*"
        )

    def classify(images: NDArray[np.uint8]) -> NDArray[np.int64]:
        return task.predictions(graph_values(graph, images, device, bars, "asking the heads"), manifest)[GUARDED]

    some = spread(len(task.images), SIZES[size].adaptive_images)
    right = classify(task.images[some]) == task.labels[some]
    if not right.any():
        raise TwogateError(f"{name}: the heads classify no image right, so there is nothing to attack")
    images, labels = task.images[some][right], task.labels[some][right]
    limit = manifest.calibration.threshold(AIMED_AT_FPR)

    @cache
    def own_head() -> Head:
        mine, classes = attackers_images(root, manifest, SIZES[size].surrogate, out / "data" / name, bars)
        if len(np.unique(classes)) < len(task.served[0].bias):
            raise TwogateError(
                f"{name}: {len(mine)} images hold not all classes for the attacker's head; use a larger --size"
            )
        answers = []
        with bars.task(f"{name}: pictures of the attacker's own", len(mine)) as progress:
            for start in range(0, len(mine), _POSTED):
                answers.append(service.ask([_png(image) for image in mine[start : start + _POSTED]]).embedding)
                progress.advance(len(answers[-1]))
        return train_head(torch.from_numpy(np.concatenate(answers)), classes)

    def measure(search: str) -> list[Record]:
        head = own_head()
        with bars.task(f"{name}: {search}, at most {queries} queries an image", queries * len(images)) as progress:
            attacker = Attacker(service, images, labels, limit, epsilon, head, classify, progress.advance)
            SEARCHES[search](attacker, images, epsilon=epsilon, queries=queries, seed=seed)
        values = {
            (SUCCESS, SERVICE): float(attacker.won.mean()),
            (NOTICED, SERVICE): attacker.flagged / attacker.queries.sum(),
            ("cosine", RETURNED): float(1 - attacker.distance.mean()),
        }
        if attacker.won.any():
            values[QUERIES, SERVICE] = float(np.median(attacker.queries[attacker.won]))
        attack = f"{search}, {queries} queries"
        return [origin.record(*key, name, attack, value, len(images), epsilon, seed) for key, value in values.items()]

    for search in searches:
        once(folder / f"{search}-own-head-{queries}-{epsilon:g}-{seed}.jsonl", partial(measure, search))


class Attacker:
    """What a search of `hardening.attacks.blackbox` asks, and the books on it.

    `images` uint8 [N, H, W, 3] at the bundle's input size, classified right as `labels` [N] say. `limit` is the largest score
    that is not flagged, `epsilon` in 1/255. `head` is the attacker's own, embeddings [M, D] -> logits [M, C].
    """

    def __init__(
        self,
        service: LiveService,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        limit: float,
        epsilon: float,
        head: Callable[[Tensor], Tensor],
        classify: Callable[[NDArray[np.uint8]], NDArray[np.int64]],
        advance: Callable[[int], None],
    ) -> None:
        self._service, self._images, self._labels = service, images, labels
        self._limit, self._epsilon, self._classify, self._advance = limit, epsilon, classify, advance
        self._head = head
        self._clean = service.ask([_png(image) for image in images]).embedding
        self._best = np.full(len(images), np.inf)
        self.distance = np.zeros(len(images))
        """[N]: of the best picture's embedding from the clean one, 1 - cosine."""
        self.queries = np.zeros(len(images), np.int64)
        """[N]: up to success, where there was one."""
        self.won = np.zeros(len(images), bool)
        """[N]"""
        self.flagged = 0
        """How many of the queries were flagged at 5 %."""

    def __call__(self, images: NDArray[np.uint8], which: NDArray[np.intp]) -> NDArray[np.float64]:
        """Loss [M] of versions [M, H, W, 3] of the images `which` [M]; -1 once an image has been broken."""
        loss = np.full(len(which), -1.0)
        still = ~self.won[which]
        images, which = images[still], which[still]
        if len(which):
            loss[still] = self._ask(images, which)
        return loss

    def _ask(self, images: NDArray[np.uint8], which: NDArray[np.intp]) -> NDArray[np.float64]:
        answers = self._service.ask([_png(image) for image in images])
        self.queries[which] += 1
        distance = 1 - (answers.embedding * self._clean[which]).sum(axis=1, dtype=np.float64)
        # Never negative, for only a success is; a margin that is already won still counts a little.
        loss = np.logaddexp(0, self._margin(answers.embedding, which)) + np.maximum(answers.score - self._limit, 0)
        passed = answers.p_value > AIMED_AT_FPR
        self.flagged += int((~passed).sum())
        # NES also asks about pictures outside its budget; those are no results.
        moved = np.abs(images.astype(int) - self._images[which]).max(axis=(1, 2, 3))
        inside = moved <= self._epsilon
        better = inside & (loss < self._best[which])
        # He watches the app, so he also learns of a win by a picture that his own head likes less than another.
        tried, won = np.flatnonzero(inside & passed), np.zeros(len(which), bool)
        if len(tried):
            won[tried] = self._classify(images[tried]) != self._labels[which[tried]]
        taken = better | won
        self._best[which[taken]], self.distance[which[taken]] = loss[taken], distance[taken]
        self.won[which[won]] = True
        loss[won] = -1
        self._advance(len(which))
        return loss

    def _margin(self, embedding: NDArray[np.float32], which: NDArray[np.intp]) -> NDArray[np.float64]:
        """Logit of the true class over the largest other one, by the attacker's own head, [M]."""
        logits = self._head(torch.from_numpy(embedding)).numpy().astype(np.float64)
        rows, labels = np.arange(len(which)), self._labels[which]
        true = logits[rows, labels]
        logits[rows, labels] = -np.inf
        return np.asarray(true - logits.max(axis=1))


def render_querying(records: Sequence[Record]) -> str:
    """The records of one bundle as a Markdown table."""
    cells: dict[tuple[str, str, float, int], dict[str, Record]] = {}
    for record in records:
        cells.setdefault((record.task, record.attack, record.epsilon, record.seed), {})[record.metric] = record
    header: tuple[str, ...] = ("task", "search", "eps", "images", "success at 0.05, %", "median queries of a success")
    lines = [
        f"| {' | '.join(header)} | queries flagged at 0.05, % | embedding's cosine |",
        "| " + "--- | " * (len(header) + 2),
    ]
    for (task, attack, epsilon, _), found in cells.items():
        row = [task, attack, f"{epsilon:g}", str(found[SUCCESS].images)]
        for metric, scale, digits in ((SUCCESS, 100, 1), (QUERIES, 1, 0), (NOTICED, 100, 1), ("cosine", 1, 3)):
            value = found[metric].value if metric in found else None
            row.append("-" if value is None or isinstance(value, list) else f"{scale * value:.{digits}f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()
