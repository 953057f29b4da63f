from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hardening.data import DataError, Dataset, batches, prepare, prepared_name, spread
from hardening.recipe import Splits
from model_store.bundle import load_bundle
from model_store.folder import MAX_FILE_BYTES, FolderError
from model_store.pixels import PixelRule, decode
from service.engine.local import LocalGate
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import CLASSES, patterns, write_patterns, write_pictures

RULE = PixelRule(height=16, width=16)
SPLITS = Splits(local=0.3, validation=0.1, fit=0.3, calibration=0.3)


def read(root: Path, into: Path, *, splits: Splits = SPLITS, seed: int = 0, bars: QuietBars | None = None) -> Dataset:
    return prepare(root, RULE, splits, seed, into, bars or QuietBars())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("labelled"), train=24, test=5)


def all_indices(dataset: Dataset) -> list[int]:
    return [int(i) for indices in dataset.splits.values() for i in indices]


def test_labelled_folders(labelled: Path, tmp_path: Path) -> None:
    dataset = read(labelled, tmp_path / "data")
    assert dataset.classes == ("class0", "class1", "class2", "class3")
    assert dataset.labelled
    assert (len(dataset.images), len(dataset.splits["test"])) == (29 * CLASSES, 5 * CLASSES)
    for path, label, image in zip(dataset.paths, dataset.labels, dataset.images, strict=True):
        assert Path(path).parts[1] == dataset.classes[label]
        np.testing.assert_array_equal(image, decode((labelled / path).read_bytes(), RULE))
    for name, indices in dataset.splits.items():
        assert {Path(dataset.paths[i]).parts[0] for i in indices} <= {"test" if name == "test" else "train"}


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (10, 4, [0, 3, 6, 9]), (7, 1, [0]), (0, 4, [])],
)
def test_some_are_evenly_spread(count: int, most: int, expected: list[int]) -> None:
    assert spread(count, most).tolist() == expected


def test_splits_are_disjoint_cover_all_and_hold_every_class_alike(labelled: Path, tmp_path: Path) -> None:
    dataset = read(labelled, tmp_path / "data")
    assert sorted(all_indices(dataset)) == list(range(len(dataset.images)))
    for name, share in (("local", 0.3), ("validation", 0.1), ("fit", 0.3), ("calibration", 0.3)):
        counts = np.bincount(dataset.labels[dataset.splits[name]], minlength=CLASSES)
        assert np.abs(counts - share * 24).max() <= 1, name


def test_the_seed_alone_decides_the_splits(labelled: Path, tmp_path: Path) -> None:
    first, again, other = (read(labelled, tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1)))
    assert all(np.array_equal(first.splits[name], again.splits[name]) for name in first.splits)
    assert not np.array_equal(first.splits["local"], other.splits["local"])
    np.testing.assert_array_equal(first.splits["test"], other.splits["test"])


def test_splits_are_written_down_and_read_again(labelled: Path, tmp_path: Path) -> None:
    first = read(labelled, tmp_path / "data")
    # Another seed would draw others; what this run began with stays.
    again = read(labelled, tmp_path / "data", seed=5)
    assert all(np.array_equal(first.splits[name], again.splits[name]) for name in first.splits)
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    assert index["splits"]["local"] == first.splits["local"].tolist()


def test_files_that_changed_since_are_refused(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    read(root, tmp_path / "data")
    write_pictures(root / "train" / "class0", patterns(1)[0][:1], prefix="new")
    with pytest.raises(DataError, match="start with a new folder"):
        read(root, tmp_path / "data")


def test_beside_pictures_without_a_folder_test_and_calibration_are_what_they_say(tmp_path: Path) -> None:
    root = tmp_path / "root"
    images = patterns(50)[0]
    for name, first, count in (("", 0, 80), ("test", 80, 40), ("calibration", 120, 60)):
        write_pictures(root / name, images[first : first + count], prefix=name or "x")
    dataset = read(root, tmp_path / "data")
    assert not dataset.labelled
    for split, count in (("test", 40), ("calibration", 60)):
        assert [dataset.paths[index].split("/")[0] for index in dataset.splits[split]] == [split] * count


def test_hidden_folders_are_no_classes_and_hold_no_data(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    plain = read(root, tmp_path / "plain")
    for place in ("train/.ipynb_checkpoints", "train/class0/.thumbnails", "test/.trash", "calibration/.trash"):
        write_pictures(root / place, patterns(1)[0][:3])
    hidden = read(root, tmp_path / "hidden")
    assert hidden.paths == plain.paths
    assert hidden.classes == plain.classes


def test_a_class_that_no_manifest_could_name_is_refused(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    (root / "train" / "class0").rename(root / "train" / os.fsdecode(b"class\xff"))
    with pytest.raises(FolderError, match="cannot be a class"):
        read(root, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*"))


def test_another_pixel_rule_is_not_served_images_of_this_one(labelled: Path, tmp_path: Path) -> None:
    read(labelled, tmp_path)
    wider = RULE.model_copy(update={"width": 2 * RULE.width})
    with pytest.raises(DataError, match="or the pixel rule"):
        prepare(labelled, wider, SPLITS, 0, tmp_path, QuietBars())
    assert prepared_name(wider, SPLITS) != prepared_name(RULE, SPLITS)


def test_too_few_images_leave_nothing_that_more_of_them_would_contradict(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=5, test=5)
    with pytest.raises(DataError, match="bring more images"):
        read(root, tmp_path / "data")
    write_patterns(root, train=24, test=5)
    assert read(root, tmp_path / "data").labelled
    few = write_patterns(tmp_path / "few", train=2, test=1)
    dataset = prepare(few, RULE, SPLITS, 0, tmp_path / "few-data", QuietBars(), least={"test": 1})
    assert len(dataset.splits["test"])


def test_a_stop_in_the_middle_of_decoding_leaves_nothing_that_is_believed(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        read(labelled, tmp_path / "data", bars=InterruptingBars(7))
    assert not (tmp_path / "data" / "index.json").exists()
    assert not (tmp_path / "data" / "images.npy").exists()
    stopped, whole = read(labelled, tmp_path / "data"), read(labelled, tmp_path / "whole")
    np.testing.assert_array_equal(stopped.images, whole.images)
    assert stopped.digest == whole.digest


def test_flat_train(tmp_path: Path) -> None:
    write_pictures(tmp_path / "root" / "train", patterns(30)[0])
    dataset = read(tmp_path / "root", tmp_path / "data")
    assert not dataset.labelled
    assert dataset.classes == ()
    assert set(dataset.labels) == {-1}
    # A fifth is set aside for the test, drawn, not the first fifth.
    assert len(dataset.splits["test"]) == 24
    assert np.ptp(dataset.splits["test"]) > 60


def test_images_right_in_the_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "root", patterns(30)[0])
    dataset = read(tmp_path / "root", tmp_path / "data")
    assert (len(dataset.images), dataset.labelled) == (120, False)
    assert sorted(all_indices(dataset)) == list(range(120))


def test_one_class_is_no_label(tmp_path: Path) -> None:
    write_pictures(tmp_path / "root" / "train" / "only", patterns(30)[0])
    assert not read(tmp_path / "root", tmp_path / "data").labelled


def test_without_test_a_fifth_of_each_class_is_set_aside(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=40)
    dataset = read(root, tmp_path / "data")
    assert np.bincount(dataset.labels[dataset.splits["test"]]).tolist() == [8] * CLASSES
    assert len(all_indices(dataset)) == len(set(all_indices(dataset))) == 160


def test_a_calibration_folder_is_the_calibration(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    write_pictures(root / "calibration", patterns(8, seed=9)[0])
    dataset = read(root, tmp_path / "data")
    calibration = dataset.splits["calibration"]
    assert {dataset.paths[i].split("/")[0] for i in calibration} == {"calibration"}
    assert (len(calibration), set(dataset.labels[calibration])) == (32, {-1})
    # Its share of train/ goes to the others.
    assert sum(len(dataset.splits[name]) for name in ("local", "validation", "fit")) == 24 * CLASSES
    assert dataset.labelled


def test_a_broken_image_is_left_out_and_named(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    broken = root / "train" / "class1" / "0003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (root / "train" / "class2" / "notes.txt").write_text("not an image")
    bars = QuietBars()
    dataset = read(root, tmp_path / "data", bars=bars)
    assert [path for path, _ in dataset.skipped] == ["train/class1/0003.png", "train/class2/notes.txt"]
    assert len(dataset.images) == len(dataset.paths) == len(dataset.labels) == 29 * CLASSES - 1
    assert "train/class1/0003.png" not in dataset.paths
    assert any("skipped train/class1/0003.png" in line for line in bars.said)
    # Those behind it did not slip by one.
    at = dataset.paths.index("train/class3/0000.png")
    np.testing.assert_array_equal(dataset.images[at], decode((root / dataset.paths[at]).read_bytes(), RULE))
    assert dataset.summary()["skipped"] == 2
    assert [list(entry) for entry in read(root, tmp_path / "data").skipped] == [list(entry) for entry in dataset.skipped]


def test_many_broken_images_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "root", patterns(30)[0])
    for number in range(13):
        (tmp_path / "root" / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (tmp_path / "root" / "fine.png").write_bytes((tmp_path / "root" / "0000.png").read_bytes())
    read(tmp_path / "root", tmp_path / "data")  # 13 of 134: just below a tenth
    (tmp_path / "root" / "broken13.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"14 of 135 files are no usable images, and at most a tenth may be; the first is broken0.jpg: "
    ):
        read(tmp_path / "root", tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_a_file_that_cannot_be_read_or_is_no_photograph_by_its_size_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    video = root / "train" / "class0" / "video.png"
    with video.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    locked = root / "train" / "class1" / "0003.png"
    real = Path.read_bytes

    def refusing(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        assert path != video
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    dataset = read(root, tmp_path / "data")
    assert {Path(path).name: reason for path, reason in dataset.skipped} == {
        "video.png": "is larger than 100 MiB",
        "0003.png": "cannot be read (Permission denied)",
    }


def test_an_image_is_in_one_split_and_once(tmp_path: Path, bars: QuietBars) -> None:
    """Copies on both sides of a line would make what is judged known to what judges."""
    root = write_patterns(tmp_path / "root", train=24, test=5)
    (root / "calibration").mkdir()
    write_pictures(root / "calibration", patterns(10, seed=9)[0])
    alone = read(root, tmp_path / "alone")
    train, calibration = (sorted((root / folder).rglob("*.png")) for folder in ("train/class0", "calibration"))
    for number, (source, folder) in enumerate(
        [(train[0], "train/class0"), (train[1], "calibration"), (train[2], "test/class0"), (calibration[0], "calibration")]
    ):
        shutil.copy(source, root / folder / f"z{number}.png")
    dataset = read(root, tmp_path / "data", bars=bars)
    assert any("4 files are copies of others" in line for line in bars.said)
    used = [dataset.paths[index] for index in all_indices(dataset)]
    contents = [(root / path).read_bytes() for path in used]
    assert len(set(contents)) == len(contents) == len(all_indices(alone))
    # What is judged keeps its copy, and training loses it.
    assert {"calibration/z1.png", "test/class0/z2.png"} <= set(used)
    assert not {"train/class0/0001.png", "train/class0/0002.png", "train/class0/z0.png", "calibration/z3.png"} & set(used)


def test_a_link_to_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    (tmp_path / "elsewhere").mkdir()
    (root / "train" / "bird").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train/bird is a link to a folder, and those are not followed"):
        read(root, tmp_path / "data")


def test_too_few_images(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=6, test=5)
    with pytest.raises(DataError, match=r"`local` has \d+ images and needs 16: bring more images, or raise splits\.local$"):
        read(root, tmp_path / "data")
    root = write_patterns(tmp_path / "more", train=24, test=5)
    with pytest.raises(DataError, match=r"`calibration` has 0 .*, or raise splits\.calibration, or add a folder"):
        read(root, tmp_path / "other", splits=SPLITS.model_copy(update={"calibration": 0.0}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "there is no folder"),
        (lambda root: root.mkdir(), "holds neither"),
        (lambda root: (root / "cat").mkdir(parents=True), "put its folders into a new one, train/"),
        (lambda root: (root / "train").mkdir(parents=True), "holds no files"),
    ],
)
def test_folders_that_hold_nothing(tmp_path: Path, make: object, said: str) -> None:
    assert callable(make)
    make(tmp_path / "root")
    with pytest.raises(DataError, match=said):
        read(tmp_path / "root", tmp_path / "data")


def test_the_folder_train_itself_leads_to_the_one_above(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=2, test=2)
    with pytest.raises(DataError, match=rf"holds neither .*; give {root}$"):
        read(root / "train", tmp_path / "data")


@pytest.mark.parametrize("stray", ["train/stray.png", "test/class9/0.png"])
def test_an_image_without_a_class_among_classes(tmp_path: Path, stray: str) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    write_pictures((root / stray).parent, patterns(1)[0][:1])
    with pytest.raises(DataError, match="this file is in none of them"):
        read(root, tmp_path / "data")


def test_a_class_too_small_to_be_in_every_split_is_refused(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    for number in range(2, 24):
        (root / "train" / "class2" / f"{number:04}.png").unlink()
    with pytest.raises(DataError, match=r"the split `\w+` has \d images of class2 and needs \d: bring more images"):
        read(root, tmp_path / "data")


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    root = write_patterns(tmp_path / "root", train=24, test=5)
    (root / "train" / "class0" / ".DS_Store").write_bytes(b"x")
    assert read(root, tmp_path / "data").skipped == ()


def test_the_pixels_are_those_that_the_service_sees(photos: list[Path], tiny_bundle: Path, tmp_path: Path) -> None:
    """The same files through the service's own way: bit for bit."""
    gate = LocalGate(load_bundle(tiny_bundle), threads=1)
    root = tmp_path / "root"
    write_pictures(root, patterns(30, 40)[0])
    for photo in photos:
        (root / photo.name).write_bytes(photo.read_bytes())
    sideways = Image.open(photos[0])
    exif = sideways.getexif()
    exif[274] = 6
    sideways.save(root / "sideways.jpg", exif=exif)
    Image.fromarray(np.full((40, 30, 4), (200, 10, 10, 100), np.uint8)).save(root / "transparent.png")
    Image.fromarray(np.linspace(0, 60000, 1200).reshape(30, 40).astype(np.uint16)).save(root / "grey16.png")
    dataset = prepare(root, gate.manifest.pixels, SPLITS, 0, tmp_path / "data", QuietBars())
    assert len(dataset.paths) == 120 + len(photos) + 3
    for path, image in zip(dataset.paths, dataset.images, strict=True):
        np.testing.assert_array_equal(image, gate.decode((root / path).read_bytes()), err_msg=path)


def test_small_pictures_can_be_had_as_they_are(labelled: Path, tmp_path: Path) -> None:
    dataset, picked = read(labelled, tmp_path / "data"), np.array([3, 0])
    large = prepare(labelled, PixelRule(height=40, width=40), SPLITS, 0, tmp_path / "large", QuietBars())
    for one in (dataset, large):
        for index, found in zip(picked, one.small(picked), strict=True):
            with Image.open(labelled / one.paths[index]) as picture:
                original = np.asarray(picture.convert("RGB"))
            assert np.array_equal(found, original if one is large else one.images[index])


@pytest.mark.parametrize("data", [None, b"no image"])
def test_a_file_that_changed_before_it_was_read_again_is_named(tmp_path: Path, data: bytes | None) -> None:
    dataset = read(write_patterns(tmp_path / "root", train=24, test=5), tmp_path / "data")
    file = dataset.root / dataset.paths[2]
    file.unlink() if data is None else file.write_bytes(data)
    assert len(dataset.small(np.array([1]))) == 1
    with pytest.raises(DataError, match=f"{file.name} has changed meanwhile"):
        dataset.small(np.array([1, 2]))


def test_batches_cover_everything_in_the_given_order() -> None:
    assert [b.tolist() for b in batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert [b.tolist() for b in batches(3, 2, np.array([2, 0, 1]))] == [[2, 0], [1]]
