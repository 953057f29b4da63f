"""A whole evaluation at toy size: records, report, what is found again, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hardening.attacks.target import Target
from hardening.calibrate import OWN_FOLDER
from hardening.data import DataError, prepare, prepared_name
from hardening.encoders import as_input
from hardening.graph import Graph
from hardening.measure import suite
from hardening.measure.evaluate import EvaluationError, attack, evaluate
from hardening.measure.knowing import HEAD_AWARE, target_of
from hardening.measure.oblivious import AttackError
from hardening.measure.records import Record, RecordsError, read
from hardening.measure.sizes import SIZES
from hardening.measure.suite import LESS_EFFORT, RETURNED
from hardening.measure.tasks import GUARDED, SYSTEMS, UNDEFENDED, Task, load_task, of_another_class
from hardening.recipe import RecipeError, Splits
from model_store.bundle import load_bundle
from model_store.calibration import Calibration
from model_store.honest import KINDS
from model_store.manifest import MODEL_FILE, Manifest
from model_store.store import publishing
from tests.conftest import REPOSITORY
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns, write_pictures


@pytest.fixture(scope="module")
def out(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    evaluate(
        [toy_bundles[0]],
        {"patterns": task_folder},
        folder,
        surrogates=[toy_bundles[1]],
        size="smoke",
        attacks=("noise", "pgd", "uap"),
        adaptive=(HEAD_AWARE, "T5-selective", "T5-selective@mixture"),
        rivals=True,
        convergence=True,
        epsilons=(10.0, 40.0),
        seeds=(0,),
        command=["twogate", "evaluate"],
        bars=QuietBars(),
    )
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> list[Record]:
    return read(out / "records")


def value(records: list[Record], metric: str, subject: str, attack: str, epsilon: float = 0.0) -> float:
    (found,) = [r for r in records if (r.metric, r.subject, r.attack, r.epsilon) == (metric, subject, attack, epsilon)]
    assert isinstance(found.value, float)
    return found.value


def test_directions(records: list[Record]) -> None:
    clean = value(records, "clean_acc", UNDEFENDED, "clean")
    assert clean > 0.8
    attacked = value(records, "robust_acc", UNDEFENDED, "pgd", 40.0)
    assert attacked < clean - 0.3
    assert attacked <= value(records, "robust_acc", UNDEFENDED, "noise", 40.0)
    assert attacked <= value(records, "robust_acc", UNDEFENDED, "pgd", 10.0)
    noise = value(records, "fooling_rate", UNDEFENDED, "noise", 10.0)
    assert value(records, "fooling_rate", UNDEFENDED, "pgd", 10.0) > noise
    assert value(records, "knn_acc", UNDEFENDED, "pgd", 40.0) < value(records, "knn_acc", UNDEFENDED, "clean") - 0.3


def test_everything_is_measured(records: list[Record]) -> None:
    for name in ("noise", "pgd", "uap"):
        for system in SYSTEMS:
            for metric in ("robust_acc", "fooling_rate", "robust/clean"):
                value(records, metric, system, name, 10.0)
        for subject in (UNDEFENDED, RETURNED):
            value(records, "knn_acc", subject, name, 10.0)
        for metric, subject in (("auroc", "detector"), ("tpr@0.05", "bundle's calibration"), ("tpr@0.05", "recalibrated")):
            value(records, metric, subject, name, 10.0)


def test_every_number_is_a_share_of_the_images_that_were_asked_for(records: list[Record]) -> None:
    assert len(records) == len({(r.metric, r.subject, r.attack, r.epsilon) for r in records})
    for r in records:
        if isinstance(r.value, list):
            assert len(r.value) == r.images
        elif r.metric not in ("auroc", "robust/clean"):
            assert 0 <= r.value <= 1, r
            assert r.value * r.images == pytest.approx(round(r.value * r.images)), r
        if not r.metric.startswith(("auroc", "tpr_fooled", "success")):
            # Without an attack the classes and the false alarms are counted on more images.
            more = r.attack == "clean" and r.metric.startswith(("clean_acc", "fpr"))
            assert r.images == (16 if "box" in r.attack else 60 if more else 40), r


def test_white_box_is_at_least_as_strong_as_grey(records: list[Record]) -> None:
    white = value(records, "robust_acc", GUARDED, f"white box {HEAD_AWARE}", 40.0)
    assert white <= value(records, "robust_acc", GUARDED, f"grey box {HEAD_AWARE}", 40.0)
    assert white < value(records, "clean_acc", GUARDED, "clean")


def test_the_grey_box_knows_the_surrogate_and_its_heads_alone(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each box attacks what it should, and no picture moves by more than epsilon."""
    aims, reached = [], []
    aim, real = suite.target_of, suite.attack_knowing

    def aimed(graph: Graph, task: Task, manifest: Manifest, attack: str) -> Target:
        aims.append((graph, task, manifest))
        return aim(graph, task, manifest, attack)

    def attacked(attack: str, target: Target, images: NDArray[np.uint8], *rest: Any, **options: Any) -> NDArray[np.uint8]:
        found = real(attack, target, images, *rest, **options)
        reached.append(int(np.abs(found.astype(int) - images).max()))
        return found

    monkeypatch.setattr(suite, "target_of", aimed)
    monkeypatch.setattr(suite, "attack_knowing", attacked)
    evaluate(
        [toy_bundles[0]],
        {"patterns": task_folder},
        tmp_path,
        surrogates=[toy_bundles[1]],
        size="smoke",
        attacks=("noise",),
        adaptive=(HEAD_AWARE,),
        epsilons=(6.0,),
        seeds=(0,),
        command=["twogate", "evaluate"],
        bars=QuietBars(),
    )
    assert reached == [6, 6]
    assert len(aims) == 2
    for (graph, task, manifest), place in zip(aims, toy_bundles, strict=True):
        own = load_bundle(place)
        assert manifest.digest == own.manifest.digest
        images = as_input(task.images[:4])
        torch.testing.assert_close(graph(images, ["embedding"]), Graph(own.model)(images, ["embedding"]))
        reference, small = Graph(own.model), SIZES["smoke"]
        heads = load_task("patterns", task_folder, reference, own.manifest, small, tmp_path, "cpu", QuietBars())
        embedding = graph(images, ["embedding"])["embedding"]
        torch.testing.assert_close(task.served_logits(embedding), heads.served_logits(embedding))


def test_what_an_attacker_aims_at(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(toy_bundles[0])
    graph = Graph(bundle.model)
    task = load_task("patterns", task_folder, graph, bundle.manifest, SIZES["smoke"], tmp_path, "cpu", QuietBars())
    images = as_input(task.images[:6])
    served, mixture, blind = (
        target_of(graph, task, bundle.manifest, attack).see(images)
        for attack in ("T5-selective", "T5-selective@mixture", HEAD_AWARE)
    )
    probabilities = served.require_logits().softmax(dim=2).mean(dim=1)
    torch.testing.assert_close(mixture.require_fused().softmax(dim=1), probabilities)
    assert not torch.allclose(served.require_fused(), mixture.require_fused())
    torch.testing.assert_close(mixture.score, served.score)
    torch.testing.assert_close(blind.require_fused(), served.require_fused())
    assert torch.isnan(blind.score).all()
    assert not blind.features


def test_another_folder_of_the_same_classes_is_told(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(toy_bundles[0])
    graph = Graph(bundle.model)

    def said(folder: Path, into: str) -> list[str]:
        bars = QuietBars()
        load_task("patterns", folder, graph, bundle.manifest, SIZES["smoke"], tmp_path / into, "cpu", bars)
        return bars.said

    assert said(task_folder, "there") == []
    folder = shutil.copytree(task_folder, tmp_path / "fewer")
    next((folder / "train").glob("*/*")).unlink()
    (line,) = said(folder, "here")
    assert "give the folder that `twogate harden` was given" in line


def test_recalibrated_is_what_recalibrate_would_promise(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(toy_bundles[0])
    loud = Calibration.of("few", bundle.manifest.calibration.scores, dict.fromkeys(KINDS, (0.0,)))
    quiet = bundle.manifest.model_copy(update={"calibration": loud})
    graph = Graph(bundle.model)
    plain, raised = (
        load_task("patterns", task_folder, graph, which, SIZES["smoke"], tmp_path, "cpu", QuietBars()).own_calibration
        for which in (bundle.manifest, quiet)
    )
    assert (plain.changes, raised.changes) == ((), KINDS)
    clean, quieter = np.array(plain.scores), np.array(raised.scores)
    assert (quieter >= clean).all()
    assert (quieter > clean).any()


def test_nothing_is_recalibrated_on_images_that_the_detector_was_fitted_on(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(task_folder, tmp_path / "root")
    write_pictures(root / "calibration", patterns(8, 16)[0])
    bundle = load_bundle(toy_bundles[0])
    splits = Splits(public=0, local=0.4, validation=0.2, fit=0.4, calibration=0)
    dataset = prepare(root, bundle.manifest.pixels, splits, 0, tmp_path / "data", QuietBars())
    made_from = {"data": dataset.summary(), "recipe": {"splits": splits.model_dump(mode="json")}}
    graph = Graph(bundle.model)

    def own(source: str) -> Calibration | None:
        table = bundle.manifest.calibration.model_copy(update={"source": source})
        manifest = bundle.manifest.model_copy(update={"calibration": table, "provenance": made_from})
        return load_task("patterns", root, graph, manifest, SIZES["smoke"], tmp_path, "cpu", QuietBars()).own_calibration

    # As it was made, the table is of detectors that had not seen these images; calibrated anew, that table is gone.
    made = own(f"64 clean images, {OWN_FOLDER}")
    assert made is not None
    assert made.scores == bundle.manifest.calibration.scores
    assert own("99 clean images, the folder scans") is None


def test_every_task_is_decoded_before_two_processes_would_do_it(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[set[str]] = []

    def look(jobs: object, workers: int, bars: object) -> None:
        found.append({file.relative_to(tmp_path).parts[1] for file in (tmp_path / "data").rglob("index.json")})

    monkeypatch.setattr("hardening.measure.evaluate.run_jobs", look)
    with pytest.raises(EvaluationError, match="no records"):
        evaluate([toy_bundles[0]], {"a": task_folder, "b": task_folder}, tmp_path, size="smoke", attacks=(), bars=QuietBars())
    assert found[0] == {"a", "b"}


def test_one_report_has_one_attacker(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(task_folder, tmp_path / "other")
    for file in sorted((other / "train").rglob("*.png"))[::2]:
        file.unlink()
    tasks = {"a": task_folder, "b": other}
    jobs: list[int] = []
    monkeypatch.setattr("hardening.measure.evaluate.run_jobs", lambda asked, *_: jobs.append(len(asked)))

    def run(order: str, attack: str) -> None:
        asked = {name: tasks[name] for name in order}
        with pytest.raises(EvaluationError, match="no records"):
            evaluate([toy_bundles[0]], asked, tmp_path / "out", size="smoke", attacks=(attack,), bars=QuietBars())

    run("ab", "uap")
    run("ba", "pgd")  # makes nothing of the training images
    run("a", "uap")
    with pytest.raises(RecordsError, match="name the same task first"):
        run("ba", "uap")
    assert jobs == [1, 2, 0, 2, 1, 1]


def test_numbers_hang_together(records: list[Record]) -> None:
    robust, clean = value(records, "robust_acc", GUARDED, "pgd", 10.0), value(records, "clean_acc", GUARDED, "clean")
    assert value(records, "robust/clean", GUARDED, "pgd", 10.0) == pytest.approx(robust / clean)
    # The toy's few clean images support no stricter budget, and none is claimed.
    budgets = {r.metric for r in records if r.metric.startswith("tpr@")}
    assert budgets == {"tpr@0.05"}
    # An attack counts as a success only where the picture is wrong and passes.
    wrong = 1 - value(records, "robust_acc", GUARDED, f"white box {HEAD_AWARE}", 40.0)
    assert value(records, "success@0.05", "bundle's calibration", f"white box {HEAD_AWARE}", 40.0) <= wrong / clean + 1e-9
    (scores,) = [r for r in records if (r.metric, r.attack) == ("scores", "clean")]
    assert isinstance(scores.value, list)
    assert len(scores.value) == scores.images


def test_other_detectors_judge_the_same_images(records: list[Record]) -> None:
    found = {r.subject: r for r in records if (r.metric, r.attack, r.epsilon) == ("auroc", "pgd", 40.0)}
    assert {"detector", "BEYOND", "feature squeezing", "Mahalanobis", "paper, S1", "paper, S5"} <= set(found)
    assert len({r.images for r in found.values()}) == 1
    # Another detector's number is another number.
    assert len({r.value for r in found.values()}) > 3


def test_more_effort_is_a_stronger_attack(records: list[Record], out: Path) -> None:
    def rates_of(name: str) -> list[float]:
        return [value(records, f"fooling_rate@effort {s:g}", UNDEFENDED, name, 10.0) for s in (*LESS_EFFORT, 1)]

    for name in ("pgd", "uap"):
        rates = rates_of(name)
        # With its whole effort it is the attack that is measured above.
        assert rates[-1] == value(records, "fooling_rate", UNDEFENDED, name, 10.0)
        assert rates[-1] >= rates[0]
    # The toy's UAP is one epoch at any effort (its own test: tests/hardening/attacks/test_strength.py); PGD has five steps.
    assert rates_of("pgd")[-1] > rates_of("pgd")[0] + 0.1
    assert value(records, "fooling_rate@effort 0.125", UNDEFENDED, "pgd", 10.0) < 1
    assert not any(r.metric.startswith("fooling_rate@effort") for r in records if r.attack == "noise" or r.epsilon == 40)
    report = (out / "report.md").read_text()
    assert "| patterns: attack | effort 0.125 | effort 0.25 | effort 0.5 | effort 1 |" in report
    assert (out / "convergence-patterns.png").is_file()


def test_more_steps_of_who_knows_the_method_succeed_no_less(records: list[Record], out: Path) -> None:
    # An eighth and a quarter of five steps are one, a half two; on the bundle that is aimed at more are never worse.
    for name in ("T5-selective", "T5-selective@mixture"):
        made = {r.attack for r in records if r.attack.startswith(f"white box {name}@") and r.attack[-1].isdigit()}
        assert made >= {f"white box {name}@1", f"white box {name}@2"}
        assert not any(r.epsilon == 40 for r in records if r.attack in made)
    steps = ("T5-selective@1", "T5-selective@2", "T5-selective")
    success = [value(records, "success@0.05", "bundle's calibration", f"white box {name}", 10.0) for name in steps]
    assert success == sorted(success)
    value(records, "success@0.05", "bundle's calibration", "grey box T5-selective@2", 10.0)
    assert "| patterns | white box T5-selective@2 | 10 |" in (out / "report.md").read_text()


def test_heads_never_see_the_images_that_the_encoders_were_tuned_on(out: Path, toy_bundles: tuple[Path, Path]) -> None:
    # The bundle's own data: the recipe's splits, not those of an unseen task.
    manifest = load_bundle(toy_bundles[0]).manifest
    splits = Splits.model_validate(manifest.provenance["recipe"]["splits"])
    assert (out / "data" / "patterns" / prepared_name(manifest.pixels, splits) / "index.json").is_file()


def test_the_report_is_rendered_from_records_alone(out: Path, records: list[Record], tmp_path: Path) -> None:
    shutil.copytree(out / "records", tmp_path / "records")
    page = evaluate([], {}, tmp_path, bars=QuietBars())
    text = page.read_text()
    assert page.with_name("report.md").read_text() == (out / "report.md").read_text().split("\n\n![patterns, ")[0] + "\n"
    shown = f"{100 * value(records, 'clean_acc', GUARDED, 'clean'):.1f}"
    assert shown in text
    assert "http://" not in text  # self-contained
    assert text.count("data:image/png;base64,") >= 3


def test_what_is_there_is_not_measured_again(
    out: Path, toy_bundles: tuple[Path, Path], task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr("hardening.measure.suite.craft", never)
    monkeypatch.setattr("hardening.measure.suite.attack_knowing", never)
    before = {file: file.stat().st_mtime_ns for file in (out / "records").rglob("*.jsonl")}
    evaluate(
        [toy_bundles[0]],
        {"patterns": task_folder},
        out,
        surrogates=[toy_bundles[1]],
        size="smoke",
        attacks=("noise", "pgd", "uap"),
        adaptive=(HEAD_AWARE, "T5-selective", "T5-selective@mixture"),
        epsilons=(10.0, 40.0),
        seeds=(0,),
        bars=QuietBars(),
    )
    assert before == {file: file.stat().st_mtime_ns for file in (out / "records").rglob("*.jsonl")}


def test_the_same_numbers_again(
    records: list[Record], toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    evaluate(
        [toy_bundles[0]],
        {"patterns": task_folder},
        tmp_path,
        size="smoke",
        attacks=("pgd", "uap"),
        epsilons=(10.0,),
        seeds=(0,),
        bars=QuietBars(),
    )
    again = {(r.metric, r.subject, r.attack): r.value for r in read(tmp_path / "records") if r.attack in ("pgd", "uap")}
    first = {(r.metric, r.subject, r.attack): r.value for r in records if r.attack in ("pgd", "uap") and r.epsilon == 10}
    assert len(again) > 40
    assert again == {key: first[key] for key in again}


def test_attacked_pictures_are_files_within_the_budget(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    written = attack(
        toy_bundles[0], task_folder, tmp_path, name="pgd", epsilon=12, images=3, size="smoke", seed=0, bars=QuietBars()
    )
    assert len(written) == 3
    for file in written:
        clean = np.asarray(Image.open(file.with_name(file.name.replace("-pgd", "-clean")))).astype(int)
        difference = np.abs(np.asarray(Image.open(file)).astype(int) - clean)
        assert 0 < difference.max() <= 12


def test_a_universal_attack_is_not_kept_for_another_size(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(size: str) -> list[Path]:
        attack(toy_bundles[0], task_folder, tmp_path, name="uap", epsilon=12, images=2, size=size, seed=0, bars=QuietBars())
        return sorted((tmp_path / ".data").rglob("*.npz"))

    first = made("smoke")
    assert made("smoke") == first
    monkeypatch.setitem(SIZES, "small", dataclasses.replace(SIZES["smoke"], surrogate=SIZES["smoke"].surrogate))
    assert len(made("small")) == 2


def test_a_targeted_attack_needs_another_picture(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(task_folder / "train", tmp_path / "root" / "train").parent
    write_pictures(root / "test" / next((root / "train").iterdir()).name, patterns(1, 16)[0][:1])

    def made(name: str) -> list[Path]:
        out = tmp_path / name
        return attack(toy_bundles[0], root, out, name=name, epsilon=12, images=1, size="smoke", seed=0, bars=QuietBars())

    assert len(made("pgd")) == 1
    with pytest.raises(DataError, match="test"):
        made("targeted")


def test_a_targeted_attack_imitates_another_class() -> None:
    labels = np.repeat(np.arange(4), 5)
    pool, rng = np.arange(20), np.random.default_rng(0)
    for which in (pool, np.array([7]), np.array([0, 1, 2])):
        found = of_another_class(labels, which, pool, rng)
        assert (labels[found] != labels[which]).all()
    # Without classes: another image, as long as there is one.
    alike = of_another_class(np.full(20, -1), np.array([0, 3]), np.array([0, 3, 9]), rng)
    assert alike.tolist() == [9, 0]


def test_records_of_another_size_or_bundle_are_not_taken_for_these(
    toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    def run(size: str) -> None:
        evaluate(
            [toy_bundles[0]],
            {"patterns": task_folder},
            tmp_path,
            size=size,
            attacks=("noise",),
            epsilons=(8,),
            seeds=(0,),
            bars=QuietBars(),
        )

    run("smoke")
    with pytest.raises(RecordsError, match=r"of size smoke, and this is size small: .* another --out"):
        run("small")
    (file,) = (tmp_path / "records").rglob("noise-8-0.jsonl")
    digest = load_bundle(toy_bundles[0]).manifest.digest
    text = file.read_text()
    file.write_text(text.replace('"bundle": "toy/1"', '"bundle": "other/1"'))
    with pytest.raises(RecordsError, match="other/1 of bundle other, and this is bundle toy"):
        run("smoke")
    file.write_text(text.replace(digest, "f" * 64))
    with pytest.raises(RecordsError, match="of digest ffffffffffff"):
        run("smoke")


def test_grey_boxes_of_other_and_of_several_surrogates(
    records: list[Record], toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path
) -> None:
    twin = load_bundle(toy_bundles[1])
    with publishing(tmp_path, twin.manifest.name) as publication:
        (publication.path / MODEL_FILE).write_bytes(twin.model)
        publication.seal(twin.manifest.model_copy(update={"created": datetime.now(UTC).replace(microsecond=0)}))

    def success(*surrogates: Path) -> list[float]:
        evaluate(
            [toy_bundles[0]],
            {"patterns": task_folder},
            tmp_path / "out",
            surrogates=surrogates,
            size="smoke",
            attacks=(),
            adaptive=(HEAD_AWARE,),
            epsilons=(40.0,),
            seeds=(0,),
            bars=QuietBars(),
        )
        name = f"grey box {HEAD_AWARE}" if len(surrogates) == 1 else f"grey box of 2 {HEAD_AWARE}"
        found = read(tmp_path / "out" / "records")
        return [r.value for r in found if (r.metric, r.subject, r.attack) == ("robust_acc", GUARDED, name)]  # type: ignore[misc]

    of_one = value(records, "robust_acc", GUARDED, f"grey box {HEAD_AWARE}", 40.0)
    another = next(tmp_path.glob(f"{twin.manifest.name}/*"))
    # Twice the same surrogate is that surrogate.
    (of_two,) = success(toy_bundles[1], another)
    assert abs(of_two - of_one) <= 0.07
    # Another one into the same folder is not taken for the first.
    assert success(toy_bundles[1]) == [pytest.approx(of_one)]
    assert success(another) == [pytest.approx(of_one)] * 2


def test_refusals(toy_bundles: tuple[Path, Path], task_folder: Path, tmp_path: Path) -> None:
    def run(**changed: object) -> None:
        evaluate([toy_bundles[0]], {"patterns": task_folder}, tmp_path, bars=QuietBars(), **changed)  # type: ignore[arg-type]

    with pytest.raises(EvaluationError, match="smoke, small, full"):
        run(size="huge")
    with pytest.raises(AttackError, match="pgd"):
        run(attacks=("pdg",))
    with pytest.raises(AttackError, match=r"whole number .* not 2\.5"):
        run(epsilons=(8.0, 2.5))
    with pytest.raises(AttackError, match="not 0"):
        run(epsilons=(0.0,))
    with pytest.raises(EvaluationError, match="negative"):
        run(seeds=(0, -1))
    with pytest.raises(EvaluationError, match="another bundle"):
        run(surrogates=[toy_bundles[0]], size="smoke")
    with pytest.raises(EvaluationError, match="of one recipe"):
        run(surrogates=[toy_bundles[1], REPOSITORY / "model_store" / "bundles" / "photos" / "1"], size="smoke")
    photos = REPOSITORY / "model_store" / "bundles" / "photos" / "1"
    with pytest.raises(EvaluationError, match="pictures of the size"):
        run(surrogates=[photos], size="smoke")
    shutil.copytree(toy_bundles[1].parent, tmp_path / "store" / "toy")
    with pytest.raises(EvaluationError, match="one name and version"):
        evaluate([toy_bundles[1], tmp_path / "store" / "toy" / toy_bundles[1].name], {"x": task_folder}, tmp_path)
    with pytest.raises(EvaluationError, match="--task"):
        evaluate([toy_bundles[0]], {}, tmp_path, bars=QuietBars())
    with pytest.raises(EvaluationError, match="no records"):
        evaluate([], {}, tmp_path / "empty", bars=QuietBars())
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, file in enumerate(sorted(task_folder.rglob("*.png"))[:240]):
        shutil.copy(file, flat / f"{index}.png")
    for asked in ({"adaptive": (HEAD_AWARE,)}, {"rivals": True}, {"convergence": True}):
        with pytest.raises(RecipeError, match="labelled"):
            evaluate([toy_bundles[0]], {"flat": flat}, tmp_path / "o", size="smoke", attacks=(), bars=QuietBars(), **asked)  # type: ignore[arg-type]
