from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hardening.evaluate import ATTACKS, CLEAN, NOISE, PGD, RETURNED, UAP, UNDEFENDED, Evaluation, Record
from hardening.report import render_card, write_report

SYSTEMS = (UNDEFENDED, "three branches, RFDM")
SETTINGS = {
    "epsilon": 10.0,
    "pgd_steps": 20,
    "pgd_restarts": 2,
    "uap_epochs": 5,
    "neighbours": 20,
    "images": 100,
    "detector": "consistency",
}
CARD = {"name": "toy", "description": "A toy.", "facts": "FACTS", "limits": "LIMITS", "making": "MAKING"}


def made_up(labelled: bool = True) -> Evaluation:
    """An evaluation in which every number differs from every other."""
    rng = np.random.default_rng(0)
    names: list[tuple[str, str, str]] = []
    if labelled:
        for system in SYSTEMS:
            names.append(("clean_acc", system, CLEAN))
            names += [(metric, system, a) for a in (NOISE, *ATTACKS) for metric in ("robust_acc", "fooling_rate")]
        names += [("knn_acc", s, c) for s in (UNDEFENDED, RETURNED) for c in (CLEAN, NOISE, *ATTACKS)]
    for detector in ("paper", "consistency") if labelled else ("consistency",):
        names += [(f"fpr@{budget}", detector, CLEAN) for budget in ("0.01", "0.05")]
        for attack in ATTACKS:
            names += [(metric, detector, attack) for metric in ("auroc", "tpr@0.01", "tpr@0.05")]
    names += [(f"fpr@{budget}", "consistency", "JPEG quality 75") for budget in ("0.01", "0.05")]
    numbers = rng.permutation(np.arange(1, 1000))[: len(names)] / 1000
    records = tuple(Record(*name, float(number), 100) for name, number in zip(names, numbers, strict=True))
    scores = {name: rng.normal(size=100).astype(np.float32) + shift for shift, name in enumerate((CLEAN, NOISE, PGD, UAP))}
    return Evaluation(records, scores, SETTINGS)


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


def percent(evaluation: Evaluation, metric: str, subject: str, condition: str) -> str:
    found = evaluation.value(metric, subject, condition)
    assert found is not None
    return f"{100 * found:.1f}"


def test_the_cards_numbers_are_the_records() -> None:
    evaluation = made_up()
    tables = rows(render_card(evaluation, CARD))
    header, _, *accuracy = tables["Accuracy of task heads, %"]
    assert [row[0] for row in accuracy] == list(SYSTEMS)
    for row in accuracy:
        for column, cell in zip(header[1:], row[1:], strict=True):
            metric, _, condition = column.partition(", ")
            assert cell == percent(evaluation, metric, row[0], condition or CLEAN), (row[0], column)
    header, _, *embedding = tables["Embedding: accuracy of the 20 nearest neighbours, %"]
    for row in embedding:
        assert row[1:] == [percent(evaluation, "knn_acc", row[0], condition) for condition in header[1:]]
    _, _, *detection = tables["Detection"]
    assert [row[0] for row in detection] == ["consistency", "consistency", "paper", "paper"]
    for detector, attack, auroc, *flagged in detection:
        assert auroc == f"{evaluation.value('auroc', detector, attack):.3f}"
        assert flagged == [percent(evaluation, f"tpr@{budget}", detector, attack) for budget in ("0.01", "0.05")]
    _, _, *alarms = tables["False alarms, %"]
    assert [row[0] for row in alarms] == [CLEAN, "JPEG quality 75"]
    for condition, *flagged in alarms:
        assert flagged == [percent(evaluation, f"fpr@{budget}", "consistency", condition) for budget in ("0.01", "0.05")]


def test_the_card_says_what_was_attacked_and_how() -> None:
    card = render_card(made_up(), CARD)
    assert "eps 10/255, L-infinity, made on the undefended public victim" in card
    assert "20 steps, best of 2 random starts" in card
    for text in ("# toy", "A toy.", "FACTS", "LIMITS", "MAKING", "fixed on the calibration images"):
        assert text in card


def test_without_labels_there_is_no_accuracy_to_tell() -> None:
    tables = rows(render_card(made_up(labelled=False), CARD))
    assert set(tables) == {"Detection", "False alarms, %"}


def test_what_was_not_measured_is_a_dash() -> None:
    evaluation = made_up()
    kept = tuple(r for r in evaluation.records if (r.metric, r.condition) != ("knn_acc", UAP))
    tables = rows(render_card(Evaluation(kept, evaluation.scores, SETTINGS), CARD))
    assert [row[-1] for row in tables["Embedding: accuracy of the 20 nearest neighbours, %"][2:]] == ["-", "-"]


@pytest.mark.parametrize("equal", [False, True])
def test_the_files_of_the_report(tmp_path: Path, equal: bool) -> None:
    evaluation = made_up()
    if equal:  # a detector that answers the same for everything still gets its plots
        evaluation.scores.update({name: np.zeros(100, np.float32) for name in evaluation.scores})
    write_report(tmp_path, evaluation, CARD)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "card.md",
        "report/metrics.json",
        "report/roc.png",
        "report/scores.png",
    ]
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["records"] == evaluation.as_json()["records"]
    for name in ("scores", "roc"):
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            # Several colours: something was drawn.
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
