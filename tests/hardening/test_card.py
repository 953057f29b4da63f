from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hardening.card import write_card
from hardening.measure.oblivious import NOISE, OBLIVIOUS
from hardening.measure.records import CLEAN, Origin, Record, read
from hardening.measure.rivals import PAPER
from hardening.measure.suite import RETURNED
from hardening.measure.tasks import GUARDED, UNDEFENDED
from model_store.bundle import load_bundle
from model_store.manifest import MODEL_FILE, Manifest
from tests.support.tiny_bundle import make_tiny_bundle

ORIGIN = Origin("toy", "f" * 64, "small", "twogate harden", "abc")
SYSTEMS = (UNDEFENDED, GUARDED)
ATTACKS = ("pgd", "uap")
OWN = "bundle's calibration"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    made = {
        "recipe": {"seed": 7, "description": "A toy.", "data_licence": "DATA", "weights_licence": "WEIGHTS"},
        "data": {"splits": {"public": 0, "local": 30, "test": 100}, "sha256": "0123456789abcdef" * 4},
        "commit": "c0ffee",
        "cores": 2,
        "device": "cpu",
        "seconds": {"finetune bmp": 90},
        "parity": {"score": 0.00012},
    }
    manifest = load_bundle(make_tiny_bundle(tmp_path_factory.mktemp("store"))).manifest
    return manifest.model_copy(update={"provenance": made})


def made_up(labelled: bool = True, attacks: tuple[str, ...] = (NOISE, *ATTACKS), spread: float = 1.0) -> list[Record]:
    """Records in which every number differs from every other."""
    rng = np.random.default_rng(0)
    names: list[tuple[str, str, str]] = []
    if labelled:
        for system in SYSTEMS:
            names.append(("clean_acc", system, CLEAN))
            names += [(metric, system, a) for a in attacks for metric in ("robust_acc", "fooling_rate")]
        names += [("knn_acc", s, c) for s in (UNDEFENDED, RETURNED) for c in (CLEAN, *attacks)]
    for change in (CLEAN, "change: JPEG quality 75"):
        names += [(f"fpr@{budget}", table, change) for budget in ("0.01", "0.05") for table in (OWN, "recalibrated")]
    for detector, table in (("detector", OWN), (PAPER, PAPER)) if labelled else (("detector", OWN),):
        for attack in attacks:
            names += [("auroc", detector, attack), ("tpr@0.01", table, attack), ("tpr@0.05", table, attack)]
    numbers = rng.permutation(np.arange(1, 1000))[: len(names)] / 1000
    records = [
        ORIGIN.record(metric, subject, "test", attack, float(number), 100, 10.0 if attack in attacks else 0.0)
        for (metric, subject, attack), number in zip(names, numbers, strict=True)
    ]
    for shift, attack in enumerate((CLEAN, *attacks)):
        scores = (spread * (rng.normal(size=100) + shift)).tolist()
        records.append(ORIGIN.record("scores", "detector", "test", attack, scores, 100, 10.0 if shift else 0.0))
    return records


def card(folder: Path, manifest: Manifest, records: list[Record]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / MODEL_FILE).write_bytes(bytes(2**20))
    write_card(folder, manifest, records)
    return (folder / "card.md").read_text(encoding="utf-8")


def rows(card: str) -> dict[str, list[list[str]]]:
    """Heading -> the cells of the table below it."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in card.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| "):
            tables.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def number(records: list[Record], metric: str, subject: str, attack: str) -> float:
    (found,) = [r.value for r in records if (r.metric, r.subject, r.attack) == (metric, subject, attack)]
    assert isinstance(found, float)
    return found


def test_the_cards_numbers_are_the_records(tmp_path: Path, manifest: Manifest) -> None:
    records = made_up()

    def percent(metric: str, subject: str, attack: str) -> str:
        return f"{100 * number(records, metric, subject, attack):.1f}"

    tables = rows(card(tmp_path, manifest, records))
    header, _, *accuracy = tables["Accuracy of task heads, %"]
    assert [row[0] for row in accuracy] == list(SYSTEMS)
    for row in accuracy:
        for column, cell in zip(header[1:], row[1:], strict=True):
            metric, _, attack = column.partition(", ")
            assert cell == percent(metric, row[0], attack or CLEAN), (row[0], column)
    header, _, *embedding = tables["Embedding: accuracy of the 20 nearest neighbours, %"]
    assert [row[0] for row in embedding] == [UNDEFENDED, RETURNED]
    for row in embedding:
        assert row[1:] == [percent("knn_acc", row[0], attack) for attack in header[1:]]
    _, _, *detection = tables["Detection"]
    # The bundle's own detector first.
    assert [row[0] for row in detection] == ["consistency", "consistency", PAPER, PAPER]
    for name, attack, auroc, *flagged in detection:
        subject, table = ("detector", OWN) if name == "consistency" else (PAPER, PAPER)
        assert auroc == f"{number(records, 'auroc', subject, attack):.3f}"
        assert flagged == [percent(f"tpr@{budget}", table, attack) for budget in ("0.01", "0.05")]
    _, _, *alarms = tables["False alarms, %"]
    assert [row[0] for row in alarms] == [CLEAN, "JPEG quality 75"]
    for condition, (_, *flagged) in zip((CLEAN, "change: JPEG quality 75"), alarms, strict=True):
        assert flagged == [percent(f"fpr@{budget}", OWN, condition) for budget in ("0.01", "0.05")]


def test_the_card_says_what_was_attacked_and_how(tmp_path: Path, manifest: Manifest) -> None:
    text = card(tmp_path, manifest, made_up())
    assert "100 test images; eps 10/255, L-infinity, made on the undefended public victim" in text
    assert "20 steps, best of 2 random starts" in text
    assert "5 epochs over at most 1000 tuning images" in text
    assert "fixed on the calibration images" in text
    assert "What it does not withstand" in text


def test_the_card_says_what_the_bundle_is_and_how_it_was_made(tmp_path: Path, manifest: Manifest) -> None:
    text = card(tmp_path, manifest, made_up())
    assert text.startswith("# tiny\n\nA toy.\n\n| | |\n")
    for row in ("| input | 32 x 32 pixels", "| embedding | 24 values", "| licence of the data | DATA |", "| size | 1.0 MiB"):
        assert row in text
    assert all(f"| {branch.name} | {branch.description} |" in text for branch in manifest.branches)
    assert "seed 7, commit c0ffee, on 2 cores (cpu): finetune bmp 1.5 min" in text
    assert "Images: 30 local, 100 test; sha256 0123456789abcdef…." in text
    assert "score 1.2e-04" in text
    assert '"weights_licence": "WEIGHTS"' in text


def test_without_labels_there_is_no_accuracy_to_tell(tmp_path: Path, manifest: Manifest) -> None:
    assert set(rows(card(tmp_path, manifest, made_up(labelled=False)))) == {"tiny", "Detection", "False alarms, %"}


def test_what_was_not_measured_is_a_dash(tmp_path: Path, manifest: Manifest) -> None:
    kept = [r for r in made_up() if (r.metric, r.attack) != ("knn_acc", "uap")]
    tables = rows(card(tmp_path, manifest, kept))
    assert [row[-1] for row in tables["Embedding: accuracy of the 20 nearest neighbours, %"][2:]] == ["-", "-"]


@pytest.mark.parametrize("attacks", [("pgd",), (NOISE,), OBLIVIOUS])
def test_any_attacks_have_a_card(tmp_path: Path, manifest: Manifest, attacks: tuple[str, ...]) -> None:
    header, *_ = rows(card(tmp_path, manifest, made_up(attacks=attacks)))["Accuracy of task heads, %"]
    assert {f"robust_acc, {attack}" for attack in attacks} <= set(header)


# A detector that answers the same for everything still gets its plots.
@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_the_files_of_the_card(tmp_path: Path, manifest: Manifest, spread: float) -> None:
    records = made_up(spread=spread)
    card(tmp_path, manifest, records)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "card.md",
        "model.onnx",
        "report/records/tiny.jsonl",
        "report/roc.png",
        "report/scores.png",
    ]
    assert read(tmp_path / "report") == records
    for name in ("scores", "roc"):
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            # Several colours: something was drawn.
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
