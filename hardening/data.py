"""Images in folders to arrays of pixels, and which image is used for what.

Every image goes through `model_store.pixels`, the very module that the service uses, once; what is trained on, calibrated
on and evaluated on are the tensors that a bundle will see.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardening.files import write_atomically
from hardening.progress import Bars
from hardening.recipe import RecipeError, Splits
from model_store.errors import ImageError, TwogateError
from model_store.folder import MAX_FILE_BYTES, class_names, files_below
from model_store.pixels import PixelRule, decode, decode_small

UNLABELLED = -1
SPLITS = ("public", "local", "validation", "fit", "calibration", "test")
_TEST_SHARE = 0.2
_MIN_PER_SPLIT = {"local": 16, "validation": 8, "fit": 16, "calibration": 19, "test": 16}
_MIN_PER_CLASS = {"local": 1, "fit": 3}
"""A head that never saw a class would number the others wrongly; three folds choose its penalty."""


class DataError(TwogateError):
    """The data folder is not what a run needs."""


@dataclass(frozen=True)
class Dataset:
    """All images of a run, decoded by the pixel rule, and the split of each."""

    images: NDArray[np.uint8]
    """[N, H, W, 3], RGB; a read-only memory map."""
    labels: NDArray[np.int64]
    """[N]; class index, or -1 where the image has no label."""
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    """Relative to the data folder."""
    splits: dict[str, NDArray[np.int64]]
    """Name -> indices into the arrays."""
    skipped: tuple[tuple[str, str], ...]
    """(path, reason) of files that are no usable image."""
    digest: str
    """sha256 over the bytes of all files used, in order."""
    root: Path
    """The data folder."""
    rule: PixelRule

    @property
    def labelled(self) -> bool:
        """Whether every image outside `calibration` has a class."""
        return len(self.classes) > 1

    def take(self, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """(images [n, H, W, 3], labels [n]) of a split, in memory."""
        indices = self.splits[split]
        return self.images[indices], self.labels[indices]

    def small(self, which: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images at some indices, [H, W, 3]; those smaller than the input as they are, [h, w, 3], from their files.

        DataError where a file is no image any more.
        """
        images = []
        for path in (self.paths[index] for index in which):
            try:
                images.append(decode_small((self.root / path).read_bytes(), self.rule))
            except (OSError, ImageError) as error:
                raise DataError(f"{self.root / path} has changed meanwhile: {error}") from None
        return images

    def summary(self) -> dict[str, Any]:
        """What the manifest and the card say about the data."""
        return {
            "images": len(self.paths),
            "classes": list(self.classes),
            "splits": {name: len(indices) for name, indices in self.splits.items()},
            "skipped": len(self.skipped),
            "sha256": self.digest,
        }


def prepared_name(rule: PixelRule, splits: Splits) -> str:
    """A name for what `prepare` makes of a folder: another rule makes other images, other splits divide them otherwise."""
    return hashlib.sha256(f"{rule.model_dump_json()} {splits.model_dump_json()}".encode()).hexdigest()[:8]


def prepare(
    root: Path,
    rule: PixelRule,
    splits: Splits,
    seed: int,
    into: Path,
    bars: Bars,
    least: Mapping[str, int] | None = None,
) -> Dataset:
    """Decode all images below `root` into `into` and draw the splits; what is already there is loaded.

    `root` holds `train/<class>/*` and `test/<class>/*`, or flat folders without classes (`train/*`, `test/*`, or images
    right in `root`); an optional `calibration/` holds clean images of the deployment's domain, labelled or not. Without
    `test/`, a fifth of the images is set aside. Hidden files and folders are left out. DataError says what is missing;
    `least` are the images that splits need, where neither heads nor a detector will be fitted.
    """
    groups, classes = _scan(root)
    files = json.dumps([(g, p, (root / p).stat().st_size) for g, p, _ in groups])
    listing = hashlib.sha256(f"{files} {rule.model_dump_json()}".encode()).hexdigest()
    index_file, array_file = into / "index.json", into / "images.npy"
    if index_file.exists():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        if index["listing"] != listing:
            raise DataError(
                f"the files in {root}, or the pixel rule, are not those that this run began with; start with a new folder "
                "(--run of harden, --out of others)"
            )
        _require(index, least)
    else:
        into.mkdir(parents=True, exist_ok=True)
        index = _decode_all(root, groups, rule, array_file, bars)
        index["listing"] = listing
        index["classes"] = classes
        copies = _copies(index["files"], index["groups"])
        if copies:
            bars.say(f"{len(copies)} files are copies of others, byte by byte, and left out: an image is in one split, once")
        index["splits"] = _draw(index["groups"], index["labels"], copies, splits, seed)
        _require(index, least)  # before it is written, so that the same folder with more images is not another one
        write_atomically(index_file, json.dumps(index).encode())
    labels = np.asarray(index["labels"], dtype=np.int64)
    return Dataset(
        # Files that are no image left unused rows at the end.
        images=np.load(array_file, mmap_mode="r")[: len(labels)],
        labels=labels,
        classes=tuple(index["classes"]),
        paths=tuple(index["paths"]),
        splits={name: np.asarray(index["splits"][name], dtype=np.int64) for name in SPLITS},
        skipped=tuple((path, reason) for path, reason in index["skipped"]),
        digest=index["digest"],
        root=root,
        rule=rule,
    )


def _require(index: Mapping[str, Any], least: Mapping[str, int] | None) -> None:
    """DataError where a split has too few images, or, where heads are to be fitted, too few of a class."""
    splits, labels = index["splits"], np.asarray(index["labels"])
    for name, wanted in (_MIN_PER_SPLIT if least is None else least).items():
        if len(splits[name]) < wanted:
            raise DataError(f"the split `{name}` has {len(splits[name])} images and needs {wanted}: {_remedy(name)}")
    for name, wanted in _MIN_PER_CLASS.items() if least is None else ():
        counts = np.bincount(labels[splits[name]], minlength=len(index["classes"])) if index["classes"] else ()
        for category, count in zip(index["classes"], counts, strict=True):
            if count < wanted:
                raise DataError(f"the split `{name}` has {count} images of {category} and needs {wanted}: bring more images")


def _remedy(split: str) -> str:
    if split == "test":
        return "bring more images"
    more = ", or add a folder calibration/" if split == "calibration" else ""
    return f"bring more images, or raise splits.{split}{more}"


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the indices 0..count-1, evenly spread: images lie class by class, so the first ones are no sample."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def batches(count: int, size: int, order: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.int64]]:
    """Index arrays of at most `size` that cover 0..count-1, in the given order."""
    order = np.arange(count) if order is None else order
    for start in range(0, count, size):
        yield order[start : start + size]


def _scan(root: Path) -> tuple[list[tuple[str, str, int]], list[str]]:
    """(group, relative path, label) of every file, and the class names."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")

    def shown(folder: Path) -> list[Path]:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))

    classes: list[str] = []
    found: list[tuple[str, str, int]] = []
    for group in ("train", "test", "calibration"):
        for entry in shown(root / group) if (root / group).is_dir() else ():
            if entry.is_symlink() and entry.is_dir():
                raise DataError(f"{entry} is a link to a folder, and those are not followed: put the folder itself there")
    if (root / "train").is_dir():
        classes = [p.name for p in shown(root / "train") if p.is_dir()]
        if len(classes) < 2:
            classes = []
        class_names(classes)
    else:
        found = [("train", p.name, UNLABELLED) for p in shown(root) if p.is_file()]
        if not found:
            advice = f"give {root.parent}" if root.resolve().name == "train" else "put its folders into a new one, train/"
            hint = f"; {advice}" if any(p.is_dir() for p in shown(root)) else ""
            raise DataError(f"{root} holds neither train/<class>/*, nor train/*, nor images{hint}")
    for group in ("train", "test", "calibration"):
        for file in sorted(files_below(root / group)):
            path = file.relative_to(root)
            folder = path.parts[1] if len(path.parts) > 2 else ""
            label = classes.index(folder) if folder in classes else UNLABELLED
            if group != "calibration" and classes and label == UNLABELLED:
                raise DataError(f"{path}: train/ has the classes {', '.join(classes)}; this file is in none of them")
            found.append((group, str(path), label))
    if not any(group == "train" for group, _, _ in found):
        raise DataError(f"{root / 'train'} holds no files")
    return found, classes


def _decode_all(
    root: Path, groups: Sequence[tuple[str, str, int]], rule: PixelRule, target: Path, bars: Bars
) -> dict[str, Any]:
    def one(path: str) -> tuple[str, NDArray[np.uint8] | str]:
        try:
            if (root / path).stat().st_size > MAX_FILE_BYTES:
                return "", f"is larger than {MAX_FILE_BYTES // 2**20} MiB"
            data = (root / path).read_bytes()
            return hashlib.sha256(data).hexdigest(), decode(data, rule)
        except OSError as error:
            return "", f"cannot be read ({error.strerror})"
        except ImageError as error:
            return "", str(error)

    partial = target.with_suffix(".partial.npy")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(groups), rule.height, rule.width, 3))
    with partial.open("rb+") as file:  # a full disk is said now: written through the map, it would end the process
        os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    total = hashlib.sha256()
    kept: list[tuple[str, str, int, str]] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, bars.task("decode images", len(groups)) as task:
        for (group, path, label), (digest, result) in zip(groups, pool.map(one, [g[1] for g in groups]), strict=True):
            if isinstance(result, str):
                skipped.append((path, result))
            else:
                array[len(kept)] = result
                total.update(digest.encode())
                kept.append((group, path, label, digest))
            task.advance()
    array.flush()
    if len(skipped) > len(groups) / 10:
        path, reason = skipped[0]
        partial.unlink()
        raise DataError(
            f"{len(skipped)} of {len(groups)} files are no usable images, and at most a tenth may be; the first is "
            f"{path}: {reason}"
        )
    for path, reason in skipped:
        bars.say(f"skipped {path}: {reason}")
    partial.replace(target)
    return {
        "groups": [g for g, _, _, _ in kept],
        "paths": [p for _, p, _, _ in kept],
        "labels": [y for _, _, y, _ in kept],
        "files": [d for _, _, _, d in kept],
        "skipped": skipped,
        "digest": total.hexdigest(),
    }


def _copies(files: Sequence[str], groups: Sequence[str]) -> set[int]:
    """Indices of the images whose file, by sha256, is there before: one in `test/` before `calibration/`, and that before
    `train/`, so that neither what is judged nor what judges was trained on."""
    order = sorted(range(len(files)), key=lambda index: (("test", "calibration", "train").index(groups[index]), index))
    seen: set[str] = set()
    copies = set()
    for index in order:
        if files[index] in seen:
            copies.add(index)
        seen.add(files[index])
    return copies


def _draw(groups: Sequence[str], labels: Sequence[int], copies: set[int], shares: Splits, seed: int) -> dict[str, list[int]]:
    """Divide the images of each class among the splits, by the seed alone; then leave the copies out."""
    rng = np.random.default_rng(seed)
    group, label = np.asarray(groups), np.asarray(labels)
    result: dict[str, list[int]] = {name: [] for name in (*SPLITS, "unused")}
    for name in ("test", "calibration"):
        result[name] = np.flatnonzero(group == name).tolist()
    share = shares.model_dump(exclude={"seed"})
    if result["calibration"]:
        share["calibration"] = 0.0
    if not result["test"]:
        share["test"] = _TEST_SHARE * sum(share.values()) / (1 - _TEST_SHARE)
    names = [name for name in (*SPLITS, "unused") if share.get(name)]
    edges = np.cumsum([share[name] for name in names]) / sum(share[name] for name in names)
    train = group == "train"
    for value in np.unique(label[train]):
        members = rng.permutation(np.flatnonzero(train & (label == value)))
        bounds = np.round(edges * len(members)).astype(int)
        for name, part in zip(names, np.split(members, bounds[:-1]), strict=True):
            result[name].extend(part.tolist())
    if not result["local"]:
        raise RecipeError("splits.local leaves no images to tune on")
    return {name: sorted(set(result[name]) - copies) for name in SPLITS}
