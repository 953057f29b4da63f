from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from hardening.branches import fuse, guarded_vote, rfdm_weights, train_head
from hardening.heads import (
    SEEN,
    VOTE_FLOOR,
    HeadError,
    Linear,
    _sharpness,
    _trained,
    add_head,
    head_graph,
    hold_out,
    labelled,
    train_heads,
)
from model_store.bundle import load_bundle, verify_bundle
from model_store.choices import Fusion
from model_store.folder import FolderError
from model_store.manifest import MODEL_FILE, Branch, Manifest
from model_store.store import StoreError, versions
from model_store.tasks import TaskHead
from tests.conftest import REPOSITORY
from tests.support.tiny_bundle import make_tiny_bundle
from tests.support.tiny_head import drawn_heads
from tests.support.toy_images import write_digits


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def by_the_formulas(
    manifest: Manifest, heads: list[Linear], embedding: NDArray[np.float32], confidence: NDArray[np.float32], fusion: Fusion
) -> NDArray[np.float64]:
    """Probabilities [N, C] in float64, written down from the paper and not from the graph."""
    logits = np.stack([embedding[:, h.start : h.start + len(h.weight)] @ h.weight + h.bias for h in heads], axis=1)
    if fusion == "guarded":
        names = [branch.name for branch in manifest.branches]
        trust = np.stack([confidence[:, names.index(h.branch)] for h in heads], axis=1)
        weights = np.clip(trust.astype(np.float64) / 0.03, 0.5, 1)
        votes = np.log(softmax(logits * np.array([h.scale for h in heads])[:, None]) + VOTE_FLOOR / logits.shape[2])
    else:
        m = softmax(logits).max(axis=2)
        weights = m * np.exp(3 * (m - 0.5))
        weights = weights / weights.sum(axis=1, keepdims=True)
        votes = logits
    return softmax((weights[:, :, None] * votes).sum(axis=1))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "store")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "digits", train=40, test=10, classes=3)


def some(n: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embeddings [n, 24] as the tiny bundle gives them, and confidences [n, 4], many of them low."""
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(n, 3, 8))
    parts /= np.linalg.norm(parts, axis=2, keepdims=True)
    embedding = (parts / np.sqrt(3)).reshape(n, 24).astype(np.float32)
    confidence = (rng.random((n, 4)) ** 3).astype(np.float32)
    confidence[0] = 0
    return embedding, confidence


@pytest.mark.parametrize("fusion", ["guarded", "rfdm"])
@pytest.mark.parametrize("classes", [2, 3, 50])
def test_the_graph_is_the_formulas(tiny: Path, fusion: Fusion, classes: int) -> None:
    manifest, heads = load_bundle(tiny).manifest, drawn_heads(classes)
    session = ort.InferenceSession(head_graph(manifest, heads, fusion), providers=["CPUExecutionProvider"])
    embedding, confidence = some(200)
    (found,) = session.run(None, {"embedding": embedding, "confidence": confidence})
    np.testing.assert_allclose(found, by_the_formulas(manifest, heads, embedding, confidence, fusion), atol=2e-5)
    assert {i.name for i in session.get_inputs()} == {"embedding", "confidence"}


@pytest.mark.parametrize("fusion", ["guarded", "rfdm"])
def test_the_formulas_are_those_of_the_branches(tiny: Path, fusion: Fusion) -> None:
    manifest, heads = load_bundle(tiny).manifest, drawn_heads()
    embedding, confidence = some(50)
    stacked = [torch.as_tensor(embedding[:, h.start : h.start + 8] @ h.weight + h.bias) for h in heads]
    logits = torch.stack(stacked, dim=1)
    if fusion == "guarded":
        scales = torch.tensor([h.scale for h in heads])[:, None]
        fused = guarded_vote(logits * scales, torch.as_tensor(confidence[:, :3], dtype=torch.float64))
    else:
        fused = fuse(logits, rfdm_weights(logits))
    expected = fused.softmax(dim=1).numpy()
    np.testing.assert_allclose(by_the_formulas(manifest, heads, embedding, confidence, fusion), expected, atol=1e-9)


def test_columns_are_picked_by_name(tiny: Path) -> None:
    """A tripwire between the branches shifts the columns of confidence, not those of the embedding."""
    manifest = load_bundle(tiny).manifest
    victim, auxiliary, clean, tripwire = manifest.branches
    moved = manifest.model_copy(update={"branches": (tripwire, victim, auxiliary, clean)})
    embedding, confidence = some(40)
    answers = []
    for one, columns in ((manifest, confidence), (moved, confidence[:, [3, 0, 1, 2]])):
        session = ort.InferenceSession(head_graph(one, drawn_heads(), "guarded"), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"embedding": embedding, "confidence": columns})[0])
    np.testing.assert_array_equal(*answers)
    starts = [head.start for head in train_heads(moved, np.tile(embedding, (2, 1)), np.arange(80) % 2, 2)]
    assert starts == [0, 8, 16]


def test_a_tripwire_that_is_part_of_the_embedding_has_no_vote(tiny: Path) -> None:
    manifest = load_bundle(tiny).manifest
    branches = tuple(
        Branch(
            name=b.name, role="tripwire" if b.name == "auxiliary" else b.role, description="", embedding_dim=b.embedding_dim
        )
        for b in manifest.branches
    )
    other = manifest.model_copy(update={"branches": branches})
    embedding, _ = some(80)
    heads = train_heads(other, embedding, np.arange(80) % 2, 2)
    assert [(head.branch, head.start) for head in heads] == [("victim", 0), ("clean", 16)]


def test_a_guarded_head_takes_half_of_the_vote_from_a_branch_that_is_not_trusted(tiny: Path) -> None:
    manifest = load_bundle(tiny).manifest
    heads = drawn_heads()
    session = ort.InferenceSession(head_graph(manifest, heads, "guarded"), providers=["CPUExecutionProvider"])
    embedding, confidence = some(100)

    def log_odds(*trust: float) -> NDArray[np.float64]:
        confidence[:] = trust
        (found,) = session.run(None, {"embedding": embedding, "confidence": confidence})
        logs = np.log(found.astype(np.float64))
        return np.asarray(logs - logs.mean(axis=1, keepdims=True))

    pair = np.log(by_the_formulas(manifest, heads[1:], embedding, np.ones_like(confidence), "guarded"))
    pair -= pair.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(log_odds(0, 1, 1, 1), (log_odds(1, 1, 1, 1) + pair) / 2, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_branchs_head_is_the_one_that_evaluation_trains(tiny: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % classes
    embedding, _ = some(90)
    embedding[:, 0] += (labels * 0.4).astype(np.float32)
    embedding[:, 3] = np.float32(0.2) + rng.normal(0, 1e-5, 90).astype(np.float32)  # a channel that hardly moves
    head = train_heads(load_bundle(tiny).manifest, embedding, labels, classes)[0]
    features = torch.as_tensor(embedding[:, :8]) * np.float32(np.sqrt(3))
    expected = train_head(features, labels)(features).numpy()
    np.testing.assert_allclose(embedding[:, :8] @ head.weight + head.bias, expected, atol=2e-3)


@pytest.mark.parametrize(("informed", "width"), [(0, 3), (3, 5), (6, 8)])
def test_a_head_reads_as_many_parts_of_its_branch_as_help(tiny: Path, informed: int, width: int) -> None:
    manifest = load_bundle(tiny).manifest
    parted = manifest.branches[0].model_copy(update={"parts": (3, 2, 3)})
    manifest = manifest.model_copy(update={"branches": (parted, *manifest.branches[1:])})
    labels = np.arange(120) % 3
    embedding, _ = some(120)
    embedding[:, informed] += labels.astype(np.float32)
    heads = train_heads(manifest, embedding, labels, 3)
    assert len(heads[0].weight) == width
    assert (heads[0].start, heads[1].start, len(heads[1].weight)) == (0, 8, 8)
    found = (embedding[:, :width] @ heads[0].weight + heads[0].bias).argmax(axis=1)
    assert (found == labels).mean() > 0.8


def test_a_head_that_adds_nothing_to_the_others_is_turned_down_and_not_off(tiny: Path) -> None:
    manifest = load_bundle(tiny).manifest
    rng = np.random.default_rng(1)
    labels = np.arange(400) % 4
    embedding = rng.normal(size=(400, 24)).astype(np.float32)
    embedding[:, 0] += 2 * np.float32(labels % 2)  # two heads that know half of it each, and one that knows nothing
    embedding[:, 8] += 2 * np.float32(labels // 2)
    scales = [head.scale for head in train_heads(manifest, embedding, labels, 4)]
    assert min(scales[:2]) > 1.2
    assert 0.05 < scales[2] < 0.8 * min(scales[:2])


@pytest.mark.parametrize("fusion", ["guarded", "rfdm"])
def test_probabilities_are_as_large_as_they_are_right(tiny: Path, fusion: Fusion) -> None:
    """Branches that err together are no three witnesses."""
    manifest = load_bundle(tiny).manifest
    rng = np.random.default_rng(0)
    labels = np.arange(6000) % 3
    shared = rng.normal(size=(6000, 8)) + 1.2 * np.eye(8)[labels]
    embedding = np.tile(shared, 3).astype(np.float32) + rng.normal(0, 0.1, (6000, 24)).astype(np.float32)
    heads, held_out = _trained(manifest, embedding[:2000], labels[:2000], 3)
    sharpness = _sharpness(held_out, labels[:2000], heads, fusion)
    answers = []
    for factor in (sharpness, 1.0):
        session = ort.InferenceSession(head_graph(manifest, heads, fusion, factor), providers=["CPUExecutionProvider"])
        trusted = np.ones((4000, 4), np.float32)
        answers.append(session.run(None, {"embedding": embedding[2000:], "confidence": trusted})[0])
    fitted, plain = answers
    right = (fitted.argmax(axis=1) == labels[2000:]).mean()
    assert abs(fitted.max(axis=1).mean() - right) < 0.04
    if fusion == "guarded":
        assert plain.max(axis=1).mean() > right + 0.06
    np.testing.assert_array_equal(fitted.argmax(axis=1), plain.argmax(axis=1))


def test_classes_that_the_encoders_were_tuned_on_are_told(tiny: Path, digits: Path) -> None:
    bundle = load_bundle(tiny)
    assert not add_head(bundle, tiny.parent.parent, "digits", digits).seen
    manifest = bundle.manifest.model_copy(update={"provenance": {"data": {"classes": ["2", "1", "0"]}}})
    found = add_head(dataclasses.replace(bundle, manifest=manifest), tiny.parent.parent, "digits", digits)
    assert found.seen
    assert SEEN in (found.place / "card.md").read_text(encoding="utf-8")


def test_training_publishes_a_version_that_classifies(tiny: Path, digits: Path) -> None:
    was = {file: file.read_bytes() for file in tiny.rglob("*") if file.is_file()}
    steps: list[int] = []
    trained = add_head(
        load_bundle(tiny), tiny.parents[1], "digits", digits, begin=steps.append, advance=lambda: steps.append(1)
    )
    assert (steps[0], sum(steps[1:])) == (150, 150)
    assert trained.place == tiny.parent / "2"
    verify_bundle(trained.place)
    bundle = load_bundle(trained.place)
    assert bundle.manifest.tasks == (trained.task,)
    assert trained.task.classes == ("0", "1", "2")
    assert trained.task.fusion == "guarded"
    assert trained.task.trained_on == "102 images of 3 classes, the folder digits"
    assert set(trained.task.metrics) == {"validation_clean_acc", "test_clean_acc"}
    assert trained.task.metrics["test_clean_acc"] > 0.8
    assert (trained.place / MODEL_FILE).read_bytes() == (tiny / MODEL_FILE).read_bytes()
    assert "## Task digits" in (trained.place / "card.md").read_text()
    assert all(file.read_bytes() == data for file, data in was.items())
    assert bundle.manifest.provenance["revisions"][0]["images"] == {"train": 102, "validation": 18, "test": 30}


def test_the_same_images_give_the_same_head(tiny: Path, digits: Path) -> None:
    one, two = (add_head(load_bundle(tiny), tiny.parents[1], "digits", digits) for _ in range(2))
    assert (one.place / one.task.file).read_bytes() == (two.place / two.task.file).read_bytes()
    other = add_head(load_bundle(tiny), tiny.parents[1], "digits", digits, seed=1)
    assert (one.place / one.task.file).read_bytes() != (other.place / other.task.file).read_bytes()


def test_test_images_choose_nothing(tiny: Path, digits: Path) -> None:
    with_test = add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)
    (digits / "test").rename(digits.parent / "set-aside")
    without = add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)
    assert (with_test.place / with_test.task.file).read_bytes() == (without.place / without.task.file).read_bytes()
    assert set(without.task.metrics) == {"validation_clean_acc"}


def test_a_head_of_the_same_name_is_replaced_and_others_stay(tiny: Path, digits: Path) -> None:
    store = tiny.parents[1]
    first = add_head(load_bundle(tiny), store, "digits", digits)
    second = add_head(load_bundle(first.place), store, "more", digits, fusion="rfdm")
    third = add_head(load_bundle(second.place), store, "digits", digits, fusion="rfdm")
    assert [(task.name, task.fusion) for task in load_bundle(third.place).manifest.tasks] == [
        ("more", "rfdm"),
        ("digits", "rfdm"),
    ]
    verify_bundle(third.place)


def test_two_classes(tiny: Path, tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "two", train=30, test=10, classes=2)
    trained = add_head(load_bundle(tiny), tiny.parents[1], "two", digits)
    bundle = load_bundle(trained.place)
    _, embedding, confidence, _ = bundle.manifest.golden.arrays()
    assert TaskHead(bundle.manifest, trained.task, bundle.heads["two"]).run(embedding, confidence).shape == (3, 2)
    assert trained.task.metrics["test_clean_acc"] > 0.9


def test_folders_of_classes_without_train(digits: Path) -> None:
    nested = labelled(digits)
    flat = labelled(digits / "train")
    assert [file.relative_to(digits / "train") for file, _ in nested.train] == [
        file.relative_to(digits / "train") for file, _ in flat.train
    ]
    assert (len(nested.test), len(flat.test)) == (30, 0)
    # Beside classes, test/ is the split, or nothing, but no class.
    (digits / "train").rename(digits / "0")
    (digits / "1").mkdir()
    (digits / "test" / "2").rename(digits.parent / "gone")
    assert labelled(digits).classes == ("0", "1")
    for folder in ("0", "1"):
        (digits / "test" / folder).rename(digits.parent / f"gone-{folder}")
    assert labelled(digits).classes == ("0", "1")


def test_a_test_class_written_in_another_way_is_named(digits: Path) -> None:
    (digits / "train/0").rename(digits / "train/caf\u00e9")
    (digits / "test/0").rename(digits / "test/cafe\u0301")
    with pytest.raises(FolderError, match="their names look the same"):
        labelled(digits)


def test_pictures_without_classes_make_none(digits: Path) -> None:
    """Of train/*.jpg and test/*.jpg, as other commands take them, a head once told train from test."""
    for place in ("train", "test"):
        for file in [*(digits / place).rglob("*.png")]:
            file.rename(digits / place / f"{file.parent.name}-{file.name}")
        for folder in [entry for entry in (digits / place).iterdir() if entry.is_dir()]:
            folder.rmdir()
    with pytest.raises(HeadError, match=r"train must hold two or more folders of images, one a class; it has none"):
        labelled(digits)


@pytest.mark.parametrize("name", ["", "Digits", "../up", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_bad_name_is_refused(tiny: Path, digits: Path, name: str) -> None:
    with pytest.raises(HeadError, match="cannot be a task's name"):
        add_head(load_bundle(tiny), tiny.parents[1], name, digits)


def test_what_cannot_be_trained_on_is_refused_and_nothing_published(tiny: Path, tmp_path: Path) -> None:
    bundle, store = load_bundle(tiny), tiny.parents[1]

    def refused(folder: Path, message: str, kind: type[Exception] = HeadError) -> None:
        with pytest.raises(kind, match=message):
            add_head(bundle, store, "digits", folder)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "two or more folders.*none")
    refused(write_digits(tmp_path / "one", train=20, test=0, classes=1), "two or more folders.*only 0")
    refused(write_digits(tmp_path / "few", train=4, test=0, classes=3), "'0' has 4 files and needs at least 5")
    stranger = write_digits(tmp_path / "stranger", train=20, test=5, classes=2)
    (stranger / "test" / "1").rename(stranger / "test" / "9")
    refused(stranger, "class '9'")
    broken = write_digits(tmp_path / "broken", train=20, test=0, classes=2)
    for file in sorted((broken / "train/0").iterdir())[:5]:
        file.write_bytes(b"no image")
    refused(broken, "5 of 40 files are no usable images", FolderError)
    assert versions(store, "tiny") == [1]
    assert [entry.name for entry in tiny.parent.iterdir()] == ["1"]


def test_what_must_fail_fails_before_anything_is_embedded(tiny: Path, digits: Path, tmp_path: Path) -> None:
    begun = list[int]()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"cannot be written \(.*\); copy the bundle's folder"):
        add_head(load_bundle(tiny), tmp_path / "file", "digits", digits, begin=begun.append)
    for file in sorted((digits / "train/1").iterdir())[4:]:
        file.unlink()
    with pytest.raises(HeadError, match="'1' has 4 files"):
        add_head(load_bundle(tiny), tiny.parents[1], "digits", digits, begin=begun.append)
    assert not begun


def test_copies_of_a_picture_count_once(tiny: Path, digits: Path) -> None:
    once = add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)
    for file in sorted((digits / "train/1").iterdir())[:20]:
        shutil.copy(file, file.with_name(f"z-{file.name}"))
    shutil.copy(file, digits / "test/1")
    twice = add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)
    assert (once.copies, twice.copies) == (0, 21)
    first, second = (load_bundle(one.place).manifest.provenance["revisions"][-1] for one in (once, twice))
    assert first["images"] == second["images"]
    assert second["copies"] == 21
    for file in sorted((digits / "train/2").iterdir())[4:]:
        file.unlink()
    shutil.copy(next((digits / "train/2").iterdir()), digits / "train/2/z.png")
    with pytest.raises(HeadError, match="'2' has 4 different usable images and needs at least 5"):
        add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)


@pytest.mark.parametrize("place", ["train/2", "test/2"])
def test_a_picture_of_two_classes_is_refused(tiny: Path, digits: Path, place: str) -> None:
    file = sorted((digits / "train/1").iterdir())[0]
    shutil.copy(file, digits / place / "other.png")
    said = f"{place}/other.png is the same picture as .*train/1/{file.name}, and cannot be both '2' and '1'"
    with pytest.raises(HeadError, match=said):
        add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)
    assert versions(tiny.parents[1], "tiny") == [1]


def test_a_few_files_that_are_no_images_are_skipped(tiny: Path, digits: Path) -> None:
    (digits / "train/0/note.txt").write_text("no image")
    trained = add_head(load_bundle(tiny), tiny.parents[1], "digits", digits)
    assert [path.name for path, _ in trained.skipped] == ["note.txt"]


def test_each_class_is_held_out_in_its_share() -> None:
    labels = np.repeat([0, 1, 2], [100, 20, 5])
    usable = np.ones(125, bool)
    usable[0] = False
    train, validation = hold_out(labels, usable, 0)
    assert np.bincount(labels[validation]).tolist() == [15, 3, 1]
    assert sorted([*train, *validation]) == list(range(1, 125))


def test_the_graph_is_old_and_plain_enough_for_every_host(tiny: Path) -> None:
    model = onnx.load_from_string(head_graph(load_bundle(tiny).manifest, drawn_heads(), "guarded"))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}


def test_no_torch_is_needed() -> None:
    code = "import sys, hardening.heads; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
