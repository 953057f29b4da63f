"""Baseline defences in an evaluation: trained once, measured beside the bundle, added to what is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hardening.baselines.classifier import Split, with_head
from hardening.encoders import Encoder, as_input
from hardening.measure.baselines import BASELINES, BaselineError, budget, public_victim, train_baseline
from hardening.measure.evaluate import EvaluationError, evaluate
from hardening.measure.records import Origin, Record, read
from hardening.measure.render import write_report
from hardening.measure.tasks import GUARDED, read_images
from hardening.recipe import Finetune
from model_store.bundle import load_bundle
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import patterns


def run(bundle: Path, tasks: dict[str, Path], out: Path, **more: Any) -> Path:
    settings = {"size": "smoke", "attacks": ("pgd", "uap"), "epsilons": (10.0,), "seeds": (0,), "bars": QuietBars()}
    return evaluate([bundle], tasks, out, **settings | more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def out(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured without baselines, and then with them."""
    folder = tmp_path_factory.mktemp("out")
    run(toy_bundles[0], {"patterns": task_folder}, folder)
    without = {file: file.stat().st_mtime_ns for file in (folder / "records").rglob("*.jsonl")}
    run(toy_bundles[0], {"patterns": task_folder}, folder, baselines=tuple(BASELINES))
    assert without == {file: file.stat().st_mtime_ns for file in without}
    return folder


def test_each_baseline_is_trained_and_measured(out: Path, toy_bundles: tuple[Path, Path]) -> None:
    records = read(out / "records")
    for system in BASELINES.values():
        found = {(r.metric, r.attack): r for r in records if r.subject == system}
        assert set(found) == {("clean_acc", "clean")} | {
            (metric, attack) for metric in ("robust_acc", "fooling_rate", "robust/clean") for attack in ("pgd", "uap")
        }
        clean, robust = found["clean_acc", "clean"], found["robust_acc", "pgd"]
        assert clean.value > 0.5  # type: ignore[operator]
        assert found["robust/clean", "pgd"].value == pytest.approx(robust.value / clean.value)  # type: ignore[operator]
        # On the very images of the bundle's own numbers.
        (ours,) = [r for r in records if (r.metric, r.subject, r.attack) == ("robust_acc", GUARDED, "pgd")]
        assert (robust.images, robust.epsilon, robust.digest) == (ours.images, ours.epsilon, ours.digest)
    files = sorted((out / "baselines").iterdir())
    names = [re.fullmatch(r"toy-1-\w{8}-\w{8}-\w{8}-smoke-(.+)-0\.pt", file.name) for file in files]
    assert {name[1] for name in names if name} == set(BASELINES)
    victim = public_victim(load_bundle(toy_bundles[0]))
    x = as_input(patterns(4)[0])
    before, seen = victim(x), []
    for file in files:
        victim.load_state_dict(torch.load(file, weights_only=True)["encoder"])
        seen.append(victim(x))
        assert (seen[-1] - before).abs().max() > 1e-3
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(seen) for b in seen[:i])


def test_a_first_look_has_images_of_every_class(
    toy_bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(_: object, __: object, local: tuple[np.ndarray, np.ndarray], *___: object, **____: object) -> None:
        seen.append(local)
        raise Interrupted

    labels = np.repeat(np.arange(100), [3, 60] * 50)
    dataset: Any = SimpleNamespace(take=lambda split: (np.zeros((len(labels), 4, 4, 3), np.uint8), labels))
    monkeypatch.setattr("hardening.measure.baselines.adversarial_training.train", train)
    with pytest.raises(Interrupted):
        train_baseline(
            "pgd-at",
            load_bundle(toy_bundles[0]),
            dataset,
            tmp_path / "x.pt",
            seed=0,
            size="smoke",
            device="cpu",
            bars=QuietBars(),
        )
    ((images, classes),) = seen
    assert set(classes) == set(range(100))
    assert len(images) == len(classes) < 250


def test_nothing_is_trained_or_measured_twice(
    out: Path, toy_bundles: tuple[Path, Path], task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("again")

    for name in ("baselines.adversarial_training.train", "baselines.gen_af.train", "suite.fit_baseline", "suite.craft"):
        monkeypatch.setattr(f"hardening.measure.{name}", never)
    run(toy_bundles[0], {"patterns": task_folder}, out, baselines=("pgd-at", "gen-af"))


def test_the_report_lists_them_and_says_who_is_ahead(out: Path) -> None:
    lines = (out / "report.md").read_text().splitlines()
    (header,) = [line for line in lines if line.startswith("| task | attacks |")]
    assert header.endswith("| three branches, plain average | PGD-AT | TRADES | MART | Gen-AF | target |")
    families = [line.split(" | ")[1] for line in lines[lines.index(header) + 2 :][:2]]
    assert families == ["PGD", "UAP"]
    assert sum(line.startswith(f"| {system} |") for line in lines for system in BASELINES.values()) == len(BASELINES)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (0.6, 0.5, "met"),
        (0.5, 0.5, "level with MART"),
        (0.4998, 0.5, "missed by less than 0.1 (MART)"),
        (0.4, 0.5, "missed by 10.0 (MART)"),
    ],
)
def test_verdict_by_hand(ours: float, theirs: float, verdict: str, tmp_path: Path) -> None:
    origin = Origin("toy/1", "f" * 64, "smoke", "", "")

    def record(subject: str, value: float, attack: str) -> Record:
        return origin.record("robust_acc", subject, "t", attack, value, 10, 8.0)

    measured = [
        record(subject, value + shift, attack)
        for subject, value in ((GUARDED, ours), ("three branches, plain average", 0.3), ("MART", theirs))
        for attack, shift in (("per", -0.1), ("pat", 0.1))
    ]
    # Not measured under one attack of its family: not compared.
    measured += [record(subject, 0.9, "pgd") for subject in (GUARDED, "three branches, plain average")]
    write_report(measured, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"| t | AdvEncoder | {100 * ours:.1f} | 30.0 | {100 * theirs:.1f} | {verdict} |" in text
    assert "| t | PGD | 90.0 | 90.0 | - | - |" in text


def test_stopped_it_goes_on_in_the_epoch(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(toy_bundles[0])
    dataset = read_images(task_folder, bundle.manifest, tmp_path / "data", QuietBars())

    def train(file: Path, bars: QuietBars) -> None:
        train_baseline("gen-af", bundle, dataset, file, seed=0, size="smoke", device="cpu", bars=bars)

    train(tmp_path / "whole.pt", QuietBars())
    (tmp_path / "stopped").mkdir()
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped" / "whole.pt", InterruptingBars(5))
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["whole.training"]
    train(tmp_path / "stopped" / "whole.pt", QuietBars())
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["whole.pt"]
    whole, again = (
        torch.load(folder / "whole.pt", weights_only=True)["encoder"] for folder in (tmp_path, tmp_path / "stopped")
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_the_budget_is_that_of_the_bundles_recipe(toy_bundles: tuple[Path, Path]) -> None:
    manifest = load_bundle(toy_bundles[0]).manifest
    given = Finetune(epochs=7, batch_size=16, epsilon=4, steps=5, learning_rate=2e-3, flip=False)
    said = manifest.model_copy(update={"provenance": {"recipe": {"finetune": given.model_dump(mode="json")}}})
    assert budget(said, "small") == {
        "epochs": 7, "batch_size": 16, "epsilon": 4.0, "steps": 5, "learning_rate": 2e-3, "flip": False, "crop": 0.7,
    }  # fmt: skip
    with pytest.raises(BaselineError, match="does not say how it was tuned"):
        budget(manifest, "small")


def test_the_learning_rate_that_is_best_on_validation_is_kept(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(toy_bundles[0])
    dataset = read_images(task_folder, bundle.manifest, tmp_path / "data", QuietBars())
    tried: list[float] = []

    def train(
        encoder: Encoder, method: str, local: Split, validation: Split, *, learning_rate: float, **_: object
    ) -> tuple[Encoder, torch.nn.Module]:
        """The second rate leaves the encoder as it is; the others ruin it."""
        tried.append(learning_rate)
        head = with_head(encoder, local, "cpu").head
        if learning_rate != 3e-4:
            torch.nn.init.zeros_(next(encoder.parameters()))
            head = with_head(encoder, local, "cpu").head
        return encoder, head

    given = {"epochs": 1, "batch_size": 32, "epsilon": 8.0, "steps": 1, "learning_rate": 1e-3, "flip": True, "crop": 0.7}
    monkeypatch.setattr("hardening.measure.baselines.budget", lambda *_: given)
    monkeypatch.setattr("hardening.measure.baselines.adversarial_training.train", train)
    (tmp_path / "x.training").mkdir()
    train_baseline("trades", bundle, dataset, tmp_path / "x.pt", seed=0, size="small", device="cpu", bars=QuietBars())
    assert tried == pytest.approx([1e-3, 3e-4, 1e-4])
    kept = torch.load(tmp_path / "x.pt", weights_only=True)["encoder"]
    assert all(torch.equal(value, kept[name]) for name, value in public_victim(bundle).state_dict().items())


def test_who_knows_a_baseline_attacks_its_own_heads(out: Path, toy_bundles: tuple[Path, Path], task_folder: Path) -> None:
    run(toy_bundles[0], {"patterns": task_folder}, out, baselines=("pgd-at",), adaptive=("PGD-head",))
    found = {(r.subject, r.attack): r for r in read(out / "records") if r.metric == "robust_acc"}
    known, ours = found["PGD-AT", "white box PGD-head"], found[GUARDED, "white box PGD-head"]
    assert (known.images, known.epsilon) == (ours.images, ours.epsilon)
    assert known.value < found["PGD-AT", "pgd"].value  # type: ignore[operator]


def test_refusals(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="pgd-at, trades, mart, gen-af"):
        run(toy_bundles[0], {"patterns": task_folder}, tmp_path, baselines=("pgd_at",))
    with pytest.raises(EvaluationError, match="first task"):
        run(toy_bundles[0], {}, tmp_path, baselines=("mart",))
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, file in enumerate(sorted(task_folder.rglob("*.png"))[:240]):
        shutil.copy(file, flat / f"{index}.png")
    with pytest.raises(EvaluationError, match="must be labelled"):
        run(toy_bundles[0], {"flat": flat, "patterns": task_folder}, tmp_path, baselines=("mart",))
