"""What a report says of the attacks' strength, and of the targets of detection."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardening.measure.records import CLEAN, Origin, Record, mean_and_spread
from hardening.measure.render import write_report
from hardening.measure.tasks import UNDEFENDED

ORIGIN = Origin("toy/1", "f" * 64, "smoke", "twogate evaluate", "abc")
BUNDLES, OWN = "bundle's calibration", "recalibrated"


def rows(records: list[Record], out: Path, heading: str) -> list[list[str]]:
    """The first table under a heading: header and rows, cell by cell."""
    write_report(records, out)
    text = (out / "report.md").read_text().partition(f"## {heading}")[2]
    table = next(part for part in text.split("\n\n") if part.startswith("| "))
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def fooling(attack: str, *rates: float, epsilon: float = 8.0) -> list[Record]:
    return [
        ORIGIN.record(metric, UNDEFENDED, "t", attack, value, 100, epsilon, seed)
        for seed, rate in enumerate(rates)
        for metric, value in (("fooling_rate", rate), ("robust_acc", 0.9 - rate))
    ]


def test_an_attack_under_its_floor_is_called_weak(tmp_path: Path) -> None:
    records = [
        ORIGIN.record("clean_acc", UNDEFENDED, "t", CLEAN, 0.9, 100),
        *fooling("pgd", 0.49),
        *fooling("targeted", 0.5),
        *fooling("uap", 0.1, 0.3),
        *fooling("ssp", 0.19),
        # Another system's rate, and an attacker's who knows the method, are no part of it.
        ORIGIN.record("fooling_rate", "BMP alone", "t", "pap-base", 0.9, 100, 8.0),
        ORIGIN.record("fooling_rate", UNDEFENDED, "t", "white box T2", 0.9, 100, 8.0),
    ]
    header, *found = rows(records, tmp_path, "Strength of the attacks")
    assert header[3:5] == ["answers changed, %", "by noise, %"]
    said = {row[1]: row[3:] for row in found}
    assert said["pgd"] == ["49.0", "-", "90.0", "41.0", "weak here: its other rows prove little"]
    assert said["targeted"] == ["50.0", "-", "90.0", "40.0", "reached"]
    assert said["uap"][0] == "20.0 ± 14.1"
    assert said["uap"][-1] == "reached"
    assert said["ssp"][-1].startswith("weak here")
    assert set(said) == {"pgd", "targeted", "uap", "ssp"}


def test_what_noise_does_as_well_is_weak(tmp_path: Path) -> None:
    records = [*fooling("uap", 0.25), *fooling("noise", 0.3), *fooling("uap", 0.25, epsilon=10.0)]
    _, *found = rows(records, tmp_path, "Strength of the attacks")
    assert [(row[2], row[4], row[-1].partition(":")[0]) for row in found] == [
        ("8", "30.0", "weak here"),
        ("10", "-", "reached"),
    ]


def test_without_an_attack_on_the_victim_there_is_nothing_to_say(tmp_path: Path) -> None:
    write_report(fooling("noise", 0.3), tmp_path)
    assert "Strength" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("auroc", "own", "shipped", "verdicts"),
    [
        (0.99, (0.8, 0.95), (0.1, 0.1), ["met", f"met, {OWN}", f"met, {OWN}"]),  # ties
        (0.985, (0.7, 0.9496), (1.0, 1.0), ["missed by 0.005", f"missed by 10.0, {OWN}", f"missed by less than 0.1, {OWN}"]),
        # Its own table has too few images for the strict budget, or there is none.
        (0.9899, (None, 0.5), (0.9, 1.0), ["missed by less than 0.001", f"met, {BUNDLES}", f"missed by 45.0, {OWN}"]),
        (1.0, (None, None), (0.5, 1.0), ["met", f"missed by 30.0, {BUNDLES}", f"met, {BUNDLES}"]),
        (1.0, (None, None), (None, None), ["met", "-", "-"]),
    ],
)
def test_each_target_of_detection_is_judged_by_a_table_that_is_named(
    auroc: float, own: tuple[float | None, ...], shipped: tuple[float | None, ...], verdicts: list[str], tmp_path: Path
) -> None:
    records = [ORIGIN.record("auroc", "detector", "t", "pgd", auroc, 100, 8.0)]
    for table, shares in ((OWN, own), (BUNDLES, shipped)):
        for budget, share in zip(("0.001", "0.01"), shares, strict=True):
            if share is not None:
                records.append(ORIGIN.record(f"tpr@{budget}", table, "t", "pgd", share, 100, 8.0))
    header, row = rows(records, tmp_path, "Detection of attacks")
    assert header[-3:] == ["target AUROC", "target at 0.001", "target at 0.01"]
    assert row[-3:] == verdicts


def test_the_order_of_a_sum_does_not_miss_a_target(tmp_path: Path) -> None:
    shares = (272 / 300, 285 / 300, 298 / 300)  # 0.95 in the mean, but for the last digit
    assert mean_and_spread(shares)[0] < 0.95
    records = [ORIGIN.record("auroc", "detector", "t", "pgd", 1.0, 300, 8.0)]
    records += [ORIGIN.record("tpr@0.01", OWN, "t", "pgd", share, 300, 8.0, seed) for seed, share in enumerate(shares)]
    assert rows(records, tmp_path, "Detection of attacks")[1][-1] == f"met, {OWN}"
