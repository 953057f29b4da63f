"""Photographs of real sizes and formats, attacked and posted to a running service.

A cell is one attacker at one size, measured in every file format. Two questions are asked of each file: does the service flag
it, and is it still an attack, once it was stored, decoded and resized? For the second, the very bytes that are posted go
through the pixel rule here, and the public victim's features are compared with those of the clean photograph in that format.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hardening.attacks.resize import through_input_size, through_resize_rule
from hardening.branches import TRIPWIRE
from hardening.graph import Graph, run_uint8
from hardening.measure.live import LiveService
from hardening.measure.records import CLEAN, Origin, Record, once
from hardening.measure.tasks import UNDEFENDED
from hardening.progress import Bars
from model_store.bundle import Bundle
from model_store.errors import TwogateError
from model_store.pixels import DECODE_ERRORS, decode

ATTACKERS: dict[str, Callable[..., NDArray[np.uint8]]] = {
    "input size": through_input_size,
    "resize rule": through_resize_rule,
}
FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "compress_level": 1},
    "JPEG q95": {"format": "JPEG", "quality": 95},
    "JPEG q85": {"format": "JPEG", "quality": 85},
    "JPEG q75": {"format": "JPEG", "quality": 75},
}
BUDGETS = (0.01, 0.05)
SERVICE = "running service"
RETURNED = "returned embedding"
READING = """\
Attacked on the bundle's public victim, stored, and posted. Input size: the attacker works at the model's input size and
enlarges the perturbation. Resize rule: he works in the photograph's own pixels, through the resizing. Flagged: the
share whose p-value, as the service returned it, is within the budget; for clean photographs these are false alarms. The
cosines say whether the attack survived storing and resizing: between attacked and clean photograph in the same format,
of the undefended victim's features (low: it survived) and of the returned embedding (low: it did harm). In the rows
`clean` they are, for scale, those of two different photographs."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class _Seen:
    """What was seen of all photographs in one format."""

    p_value: NDArray[np.float64]
    embedding: NDArray[np.float32]
    """[N, D], unit length"""
    features: NDArray[np.float32]
    """[N, d], the public victim's, scaled to unit length"""


def find_photographs(root: Path) -> list[Path]:
    """The image files below a folder, sorted; TwogateError where there are none."""
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    if not found:
        raise TwogateError(f"there are no photographs ({', '.join(_SUFFIXES)}) in {root}")
    return found


def photograph(path: Path, side: int | None = None) -> NDArray[np.uint8]:
    """A photograph upright and in RGB, uint8 [H, W, 3]: at its own size, or with `side` pixels on its longer side.

    A small one is enlarged.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except DECODE_ERRORS as error:
        raise TwogateError(f"{path} cannot be read: {error}") from None
    if side is not None:
        upright = upright.resize(_size(upright.size, side), Image.Resampling.BICUBIC)
    return np.asarray(upright, dtype=np.uint8)


def stored(photo: NDArray[np.uint8], name: str) -> bytes:
    """The photograph [H, W, 3] as a file in one of FORMATS; chroma at half size in the JPEGs, as Pillow and phones do."""
    file = io.BytesIO()
    Image.fromarray(photo).save(file, **FORMATS[name])
    return file.getvalue()


def measure_photographs(
    bundle: Bundle,
    service: LiveService,
    root: Path,
    folder: Path,
    origin: Origin,
    *,
    sides: Sequence[int],
    epsilon: float,
    steps: int,
    seed: int,
    device: str,
    bars: Bars,
) -> None:
    """Measure every cell that is not in `folder` yet: clean, and each attacker, at each size. Its name is that of these
    photographs in the records.

    TwogateError before any work where the service would refuse a file for its size.
    """
    room = _Room(bundle, service, root, folder.name, origin, epsilon, steps, seed, device, bars)
    room.check_sizes(max(sides))
    for side in sides:
        # Numbers of one width: records are read in the order of their files.
        once(folder / f"{side:05d}-{CLEAN}.jsonl", partial(room.clean, side))
        for attacker in ATTACKERS:
            file = folder / f"{side:05d}-{attacker.replace(' ', '-')}-{epsilon:g}-{seed}.jsonl"
            once(file, partial(room.attacked, side, attacker))


def render_photographs(records: Sequence[Record]) -> str:
    """The records of one bundle as a Markdown table."""
    cells: dict[tuple[str, str, float, int], dict[str, Record]] = {}
    for record in records:
        key = (record.task, record.attack, record.epsilon, record.seed)
        cells.setdefault(key, {})[f"{record.metric} {record.subject}"] = record

    def shown(found: dict[str, Record], metric: str, scale: int, digits: int) -> str:
        record = found.get(metric)
        return "-" if record is None or isinstance(record.value, list) else f"{scale * record.value:.{digits}f}"

    header: tuple[str, ...] = ("photographs", "attacker", "eps", "images", "flagged at 0.01, %", "flagged at 0.05, %")
    header += ("victim's cosine", "embedding's cosine")
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    for (task, attack, epsilon, _), found in cells.items():
        rate = "fpr" if attack == CLEAN else "tpr"
        row = [task, attack, f"{epsilon:g}", str(next(iter(found.values())).images)]
        row += [shown(found, f"{rate}@{budget:g} {SERVICE}", 100, 1) for budget in BUDGETS]
        row += [shown(found, f"cosine {subject}", 1, 3) for subject in (UNDEFENDED, RETURNED)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


class _Room:
    """One folder of photographs, and everything that its cells share."""

    def __init__(
        self,
        bundle: Bundle,
        service: LiveService,
        root: Path,
        name: str,
        origin: Origin,
        epsilon: float,
        steps: int,
        seed: int,
        device: str,
        bars: Bars,
    ) -> None:
        self.manifest, self.service, self.origin, self.bars = bundle.manifest, service, origin, bars
        self.name, self.paths = name, find_photographs(root)
        self.epsilon, self.steps, self.seed, self.device = epsilon, steps, seed, device
        self.graph = Graph(bundle.model).to(device)
        self.victim = self.graph.encoder(TRIPWIRE)
        self._clean: tuple[int, dict[str, _Seen]] = (0, {})

    def check_sizes(self, side: int) -> None:
        """TwogateError where a PNG at the largest size could be more than the service takes."""
        most = max(3 * width * height for width, height in (_size(_shape(path), side) for path in self.paths))
        if most > self.service.max_image_bytes:
            raise TwogateError(
                f"at {side} pixels a PNG may have {most} bytes, and the service takes {self.service.max_image_bytes}: start "
                f"it with TWOGATE_MAX_IMAGE_BYTES={most} TWOGATE_MAX_BODY_BYTES={most + 2**20}, or ask for smaller --sides"
            )

    def clean(self, side: int) -> list[Record]:
        """False alarms at one size; and, as a scale for the cosines, how near two different photographs are."""
        records = []
        for name, seen in self.clean_at(side).items():
            records += self.flags("fpr", side, name, CLEAN, seen)
            if len(self.paths) > 1:
                records += self.cosines(
                    side, name, CLEAN, seen, [np.roll(v, 1, axis=0) for v in (seen.features, seen.embedding)]
                )
        return records

    def attacked(self, side: int, attacker: str) -> list[Record]:
        """Every format of one attacker at one size."""
        clean, records = self.clean_at(side), []
        for name, seen in self.seen(side, attacker).items():
            records += self.flags("tpr", side, name, attacker, seen)
            records += self.cosines(side, name, attacker, seen, [clean[name].features, clean[name].embedding])
        return records

    def clean_at(self, side: int) -> dict[str, _Seen]:
        """The clean photographs at one size, asked about when a cell first needs them."""
        if self._clean[0] != side:
            self._clean = (side, self.seen(side, None))
        return self._clean[1]

    def seen(self, side: int, attacker: str | None) -> dict[str, _Seen]:
        """All photographs at one size, clean or attacked, in every format."""
        posted, features = [], []
        tripwire = self.graph.feature_names[TRIPWIRE]
        with self.bars.task(f"{self.name}, {side} px: {attacker or CLEAN}", len(self.paths)) as task:
            for path in self.paths:
                photo = photograph(path, side)
                if attacker is not None:
                    photo = ATTACKERS[attacker](
                        self.victim,
                        photo,
                        self.manifest.pixels,
                        epsilon=self.epsilon,
                        steps=self.steps,
                        seed=self.seed,
                        device=self.device,
                    )
                files = [stored(photo, name) for name in FORMATS]
                posted.append(self.service.ask(files))
                pixels = np.stack([decode(file, self.manifest.pixels) for file in files])
                features.append(_unit(run_uint8(self.graph, pixels, (tripwire,), self.device)[tripwire].numpy()))
                task.advance(1, path.name)
        return {
            name: _Seen(
                np.array([answers.p_value[index] for answers in posted]),
                np.stack([answers.embedding[index] for answers in posted]),
                np.stack([found[index] for found in features]),
            )
            for index, name in enumerate(FORMATS)
        }

    def flags(self, rate: str, side: int, name: str, attack: str, seen: _Seen) -> list[Record]:
        """Share flagged, at each budget that the bundle's calibration supports."""
        budgets = [budget for budget in BUDGETS if budget >= self.manifest.calibration.smallest_budget]
        return [self.record(f"{rate}@{b:g}", SERVICE, side, name, attack, (seen.p_value <= b).mean()) for b in budgets]

    def cosines(self, side: int, name: str, attack: str, seen: _Seen, others: list[NDArray[np.float32]]) -> list[Record]:
        """Mean cosine to other values of the same kind: the public victim's features, the returned embeddings."""
        pairs = zip((UNDEFENDED, RETURNED), (seen.features, seen.embedding), others, strict=True)
        return [self.record("cosine", s, side, name, attack, (a * b).sum(axis=1).mean()) for s, a, b in pairs]

    def record(self, metric: str, subject: str, side: int, name: str, attack: str, value: np.floating[Any]) -> Record:
        """A number of one size and format."""
        epsilon, seed = (0.0, 0) if attack == CLEAN else (self.epsilon, self.seed)
        task = f"{self.name}, {side} px, {name}"
        return self.origin.record(metric, subject, task, attack, float(value), len(self.paths), epsilon, seed)


def _shape(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            # Upright or not: only the product is asked for.
            return image.size
    except DECODE_ERRORS as error:
        raise TwogateError(f"{path} cannot be read: {error}") from None


def _size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) with `side` on the longer side."""
    width, height = (max(1, round(n * side / max(size))) for n in size)
    return width, height


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
