"""The whole path at its smallest: what `twogate harden` promises about kills, repeats and other people's folders."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hardening import data, pipeline
from hardening.files import load_tensors
from hardening.measure import suite
from hardening.measure.oblivious import AttackError
from hardening.measure.records import read
from hardening.measure.suite import Plan
from hardening.pipeline import RunError, harden
from hardening.recipe import EncoderSpec, Finetune, Pretrain, RecipeError, load_recipe
from model_store.bundle import load_bundle, verify_bundle
from model_store.store import StoreError, versions
from tests.conftest import REPOSITORY
from tests.hardening.conftest import Interrupted, QuietBars
from tests.support.patterns import patterns, write_patterns, write_pictures


def write_recipe(path: Path, *, labelled: bool = True, **changes: Any) -> Path:
    def encoder(method: str, split: str) -> dict[str, Any]:
        pretrain = {"method": method, "split": split, "epochs": 1, "batch_size": 16}
        return {"architecture": "resnet8_cifar", "pretrain": pretrain}

    content = {
        "name": "tiny",
        "pixels": {"height": 16, "width": 16},
        "splits": {"public": 0.2, "local": 0.3, "validation": 0.1, "fit": 0.2, "calibration": 0.2},
        "victim": encoder("supcon" if labelled else "simclr", "public"),
        "auxiliary": encoder("vicreg", "public"),
        "bmp": encoder("barlowtwins", "local"),
        "finetune": {"epochs": 3, "batch_size": 16, "steps": 1, "flip": False},
        "bmp_finetune": {"epochs": 1, "batch_size": 16, "epsilon": 0},
        "evaluate": {"images": 20},
    }
    path.write_text(yaml.safe_dump({**content, **changes}), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Killed:
    root: Path
    recipe: Path
    store: Path
    run: Path
    bundle: Path
    left: list[str]
    """What lay in the run directory and the store after the kill."""


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A run whose process is killed while it tunes, and that is then ended by the same command."""
    folder = tmp_path_factory.mktemp("killed")
    root, recipe = write_patterns(folder / "root", train=40, test=6), write_recipe(folder / "tiny.yaml")
    store, run = folder / "store", folder / "run"
    command = [sys.executable, "-m", "cli", "harden", str(recipe), "--data", str(root), "--store", str(store)]
    command += ["--run", str(run), "--device", "cpu"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        try:
            wait_for("encoders/finetune *.checkpoint.pt", run, first)
        finally:
            first.kill()
    left = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file() and root not in p.parents]
    second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stderr
    return Killed(root, recipe, store, run, Path(second.stdout.strip()), left)


def weights(run: Path, role: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_tensors(run / "encoders" / f"finetune {role}.pt")["encoder"]
    return state


def test_a_killed_run_leaves_nothing_in_the_store(killed: Killed) -> None:
    assert any("finetune" in name for name in killed.left)
    assert not any(name.startswith("store") for name in killed.left)


def test_the_same_command_goes_on_and_publishes(killed: Killed) -> None:
    assert killed.bundle == killed.store / "tiny" / "1"
    assert versions(killed.store, "tiny") == [1]
    assert [p.name for p in (killed.store / "tiny").iterdir()] == ["1"]
    assert verify_bundle(killed.bundle)
    assert not list(killed.run.rglob("*checkpoint*"))
    assert not [p for p in killed.run.rglob("*.partial*") if not p.name.startswith(".")]


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(killed: Killed, tmp_path: Path, bars: QuietBars) -> None:
    recipe = load_recipe(killed.recipe)
    dataset = data.prepare(killed.root, recipe.pixels, recipe.splits, recipe.seed, tmp_path / "data", bars)
    for role in pipeline.ROLES:
        pipeline.train_encoder(recipe, dataset, role, tmp_path, "cpu", bars)
        expected, found = weights(tmp_path, role), weights(killed.run, role)
        assert set(expected) == set(found)
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), role


def again(killed: Killed, **changes: Any) -> Path:
    arguments = {"recipe_path": killed.recipe, "data_root": killed.root, "store": killed.store, "run": killed.run}
    return harden(**{**arguments, "device": "cpu", "bars": QuietBars(), **changes})


def test_a_finished_run_returns_its_bundle(killed: Killed) -> None:
    bars = QuietBars()
    assert again(killed, bars=bars).samefile(killed.bundle)
    assert versions(killed.store, "tiny") == [1]
    assert any("already published" in line for line in bars.said)


def test_a_finished_run_is_not_of_another_store(killed: Killed, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RunError, match="has already published"):
            again(killed, store=tmp_path / "store")
        (tmp_path / "store").mkdir(exist_ok=True)


def test_a_finished_run_needs_its_weights_files_no_more(tmp_path: Path) -> None:
    weights = tmp_path / "victim.pt"
    weights.write_bytes(b"weights")
    victim = {"architecture": "resnet8_cifar", "weights": str(weights)}
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", victim=victim))
    run = tmp_path / "run"
    with pipeline._owned(run, recipe, tmp_path):
        pass
    (run / "encoders").mkdir()
    (run / "encoders" / "finetune victim.pt").touch()
    weights.write_bytes(b"others")
    with pytest.raises(RunError, match="another recipe, data folder or weights file"), pipeline._owned(run, recipe, tmp_path):
        pass
    (run / "bundle.json").write_text("{}")
    weights.unlink()
    with pipeline._owned(run, recipe, tmp_path):
        pass


def test_a_store_that_cannot_be_written_is_refused_before_hours_of_training(killed: Killed, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written"):
        again(killed, store=tmp_path / "store", run=tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_a_run_of_another_recipe_or_data_folder_is_refused(killed: Killed, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="belongs to another recipe, data folder or weights file"):
        again(killed, recipe_path=write_recipe(tmp_path / "other.yaml", seed=5))
    with pytest.raises(RunError, match="belongs to another recipe, data folder or weights file"):
        again(killed, data_root=tmp_path)
    # The same recipe in another file is the same recipe.
    assert again(killed, recipe_path=write_recipe(tmp_path / "same.yaml")).samefile(killed.bundle)


def test_before_anything_was_trained_a_mended_recipe_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(2):
        recipe = load_recipe(write_recipe(tmp_path / "tiny.yaml", seed=number))
        with pipeline._owned(run, recipe, tmp_path):
            assert not (run / "data").exists()
            (run / "data").mkdir()
    (run / "encoders").mkdir()
    (run / "encoders" / "pretrain bmp.checkpoint.pt").touch()
    with (
        pytest.raises(RunError, match="another recipe"),
        pipeline._owned(run, load_recipe(write_recipe(tmp_path / "x")), tmp_path),
    ):
        raise AssertionError("owned")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"victim": {"architecture": "vit_tiny_patch16_224", "pretrain": {"method": "simclr"}}},
            "does not take pictures of 16 x 16",
        ),
        (
            {"bmp": {"architecture": "resnet8_cifr", "pretrain": {"method": "simclr"}}},
            "there is no architecture 'resnet8_cifr'",
        ),
    ],
)
def test_an_encoder_that_cannot_be_is_refused_before_any_image_is_read(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", **changes)
    with pytest.raises(RecipeError, match=said):
        harden(recipe, tmp_path / "nothing", tmp_path / "store", tmp_path / "run", bars=QuietBars())


def test_where_encoders_come_from_is_told_as_it_is() -> None:
    local, public = Pretrain(method="simclr"), Pretrain(method="simclr", split="public")
    for weights, pretrain, told in (
        ("x.pt", None, "of public weights"),
        (None, local, "pre-trained on local images only"),
        (None, public, "pre-trained on the split `public`"),
        ("x.pt", local, "of public weights, then pre-trained on local images only"),
    ):
        spec = EncoderSpec(architecture="a", weights=weights, pretrain=pretrain)
        assert pipeline._origin(spec) == f"(a) {told}"
    assert pipeline._tuning(Finetune(epsilon=4)) == "adversarially fine-tuned (epsilon 4)"
    assert pipeline._tuning(Finetune(epsilon=0)) == "fine-tuned on clean local images"
    assert pipeline._tuning(Finetune(epochs=0)) == "as it was"


def test_a_weights_file_that_was_written_over_is_another_encoder(tmp_path: Path) -> None:
    weights = tmp_path / "last.pt"
    torch.save({}, weights)
    spec = {"architecture": "resnet8_cifar", "weights": str(weights)}
    recipe = load_recipe(write_recipe(tmp_path / "tiny.yaml", victim=spec))
    with pipeline._owned(tmp_path / "run", recipe, tmp_path):
        pass
    (tmp_path / "run" / "encoders").mkdir()
    (tmp_path / "run" / "encoders" / "finetune auxiliary.checkpoint.pt").touch()
    torch.save({"other": 1}, weights)
    with pytest.raises(RunError, match="weights file"), pipeline._owned(tmp_path / "run", recipe, tmp_path):
        raise AssertionError("owned")


def test_what_a_stop_left_beside_the_trainings_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "encoders").mkdir()
    for name, history in (("sentinel", [{"seconds": 2.0}]), ("finetune bmp.checkpoint", [{"seconds": 9.0}])):
        torch.save({"history": history}, tmp_path / "encoders" / f"{name}.pt")
    torch.save({"pgd": torch.zeros(1)}, tmp_path / "encoders" / "sentinel.attacks.pt")
    torch.save({"key": torch.zeros(1)}, tmp_path / "encoders" / "key bmp.pt")
    assert pipeline._training_seconds(tmp_path) == {"sentinel": 2}


@pytest.fixture
def held(killed: Killed) -> Iterator[None]:
    """Somebody else holds the run directory."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(killed.run / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


@pytest.mark.usefixtures("held")
def test_a_second_process_in_one_run_is_refused(killed: Killed) -> None:
    with pytest.raises(RunError, match="another process is working in"):
        again(killed)


def test_the_lock_goes_with_its_owner(killed: Killed) -> None:
    again(killed)
    with (killed.run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_manifest_and_the_card_tell_the_run(killed: Killed) -> None:
    manifest = load_bundle(killed.bundle).manifest
    provenance = manifest.provenance
    assert provenance["recipe"]["name"] == "tiny"
    assert provenance["data"]["splits"]["test"] == 24
    assert provenance["data"]["classes"] == ["class0", "class1", "class2", "class3"]
    assert {"torch", "onnx", "timm"} <= set(provenance["libraries"])
    assert set(provenance["seconds"]) >= {"finetune victim", "pretrain bmp"}
    assert [branch.parts for branch in manifest.branches] == [(64, 16 + 32, 32)] * 3 + [()]
    assert manifest.embedding_dim == 3 * 144
    assert [branch.role for branch in manifest.branches] == ["mpae", "mpae", "bmp", "tripwire"]
    assert manifest.calibration.n == provenance["data"]["splits"]["calibration"]
    card = (killed.bundle / "card.md").read_text(encoding="utf-8")
    for text in ("consistency", provenance["commit"], "What it does not withstand", '"name": "tiny"'):
        assert text in card
    for file in (killed.bundle / "manifest.json", killed.bundle / "card.md"):
        assert str(killed.root.parent) not in file.read_text(encoding="utf-8")
    records = read(killed.bundle / "report")
    assert {record.metric for record in records} >= {"clean_acc", "robust_acc", "fooling_rate", "knn_acc", "auroc"}
    assert {record.attack for record in records} >= {"clean", "noise", "pgd", "uap"}
    assert {record.images for record in records if record.metric == "clean_acc"} == {20}
    # The records name the very graph that ships.
    assert {record.digest for record in records} == {manifest.files["model.onnx"]}
    assert "| paper, S1 | pgd |" in card


def test_no_image_of_the_data_ships(killed: Killed) -> None:
    pictures = [p.name for p in killed.bundle.rglob("*") if p.suffix in (".png", ".npy", ".npz")]
    assert sorted(pictures) == ["roc.png", "scores.png"]


def test_only_images_that_nothing_was_tuned_on_are_measured(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def measured(plan: Plan, name: str, dataset: data.Dataset, victim: object, *, bars: QuietBars) -> None:
        given.append((plan, dataset))

    monkeypatch.setattr(pipeline, "measure_task", measured)
    recipe = load_recipe(killed.recipe)
    dataset = data.prepare(killed.root, recipe.pixels, recipe.splits, 0, killed.run / "data", QuietBars())
    bundle = load_bundle(killed.run / "staged" / "tiny" / "1")
    pipeline._measured(bundle, recipe, dataset, killed.run, "cpu", QuietBars())
    ((plan, found),) = given
    # The very splits of the tuning, so that its test images are none that were tuned on, and all of `fit` for the heads.
    assert found is dataset
    assert plan.size.fit >= len(dataset.splits["fit"])
    assert load_bundle(plan.bundle).model == load_bundle(killed.bundle).model


def test_a_run_killed_while_it_measures_goes_on_there(
    killed: Killed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store, crafted = tmp_path / "run", tmp_path / "store", []
    for name in ("encoders", "data", "staged"):
        shutil.copytree(killed.run / name, run / name)
    craft = suite.craft

    def interrupted(name: str, *arguments: Any) -> Any:
        crafted.append(name)
        if name == "pgd" and len(crafted) < 3:
            raise Interrupted
        return craft(name, *arguments)

    monkeypatch.setattr(suite, "craft", interrupted)
    # What is staged is not made again.
    monkeypatch.setattr(pipeline, "_stage", None)
    with pytest.raises(Interrupted):
        again(killed, run=run, store=store)
    assert not store.exists()
    cells = {file: file.stat().st_mtime_ns for file in (run / "evaluation" / "records").rglob("*.jsonl")}
    assert cells
    bundle = again(killed, run=run, store=store)
    assert crafted == ["noise", "pgd", "pgd"]
    assert cells.items() <= {f: f.stat().st_mtime_ns for f in (run / "evaluation" / "records").rglob("*.jsonl")}.items()
    assert verify_bundle(bundle)

    def numbers(bundle: Path) -> dict[tuple[str, str, str], Any]:
        return {(r.metric, r.subject, r.attack): r.value for r in read(bundle / "report")}

    assert numbers(bundle) == numbers(killed.bundle)


def test_an_unknown_attack_is_refused_before_anything_is_done(killed: Killed, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", evaluate={"attacks": ["pdg"]})
    with pytest.raises(AttackError, match="pgd"):
        again(killed, recipe_path=recipe, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_papers_detector_goes_all_the_way(killed: Killed, tmp_path: Path) -> None:
    """With the encoders of the finished run, as a resumed one would find them."""
    run = tmp_path / "run"
    for name in ("encoders", "data"):
        shutil.copytree(killed.run / name, run / name)
    recipe = write_recipe(tmp_path / "paper.yaml", detector="paper")
    bundle = again(killed, recipe_path=recipe, run=run, store=tmp_path / "store")
    manifest = load_bundle(bundle).manifest
    assert manifest.detector.name == "paper"
    assert manifest.detector.parameters["paper_threshold"] == 0.1
    # The tripwire is not needed, so it is not shipped.
    assert [branch.name for branch in manifest.branches] == ["mpae_victim", "mpae_auxiliary", "bmp"]
    assert (bundle / "model.onnx").stat().st_size < (killed.bundle / "model.onnx").stat().st_size
    card = (bundle / "card.md").read_text(encoding="utf-8")
    assert "| paper | pgd |" in card
    # Its own rule is not shown twice, and the victim that is not shipped is attacked and compared with all the same.
    assert "paper, S1" not in card
    assert "| undefended victim |" in card


def test_the_papers_detector_without_labels_is_refused_before_hours_of_training(tmp_path: Path) -> None:
    write_pictures(tmp_path / "root", patterns(50)[0])
    file = write_recipe(tmp_path / "tiny.yaml", labelled=False, detector="paper")
    with pytest.raises(RecipeError, match="needs labelled images"):
        harden(file, tmp_path / "root", tmp_path / "store", tmp_path / "run", "cpu", QuietBars())
    assert not (tmp_path / "run" / "encoders").exists()


def test_pictures_without_labels_go_all_the_way(tmp_path: Path) -> None:
    write_pictures(tmp_path / "root", patterns(50)[0])
    file = write_recipe(tmp_path / "tiny.yaml", labelled=False, finetune={"epochs": 1, "steps": 1, "batch_size": 16})
    recipe, root, run = load_recipe(file), tmp_path / "root", tmp_path / "run"
    # The trainings in this process, which is quicker than starting others; `harden` finds them done.
    dataset = data.prepare(root, recipe.pixels, recipe.splits, recipe.seed, run / "data", QuietBars())
    for role in pipeline.ROLES:
        pipeline.train_encoder(recipe, dataset, role, run, "cpu", QuietBars())
    bundle = harden(file, root, tmp_path / "store", run, "cpu", QuietBars())
    manifest = load_bundle(bundle).manifest
    assert manifest.detector.name == "consistency"
    assert manifest.provenance["data"]["classes"] == []
    card = (bundle / "card.md").read_text(encoding="utf-8")
    assert "## Detection" in card
    assert "Accuracy of task heads" not in card
    assert {record.metric.split("@")[0] for record in read(bundle / "report")} == {"auroc", "tpr", "fpr", "scores"}
