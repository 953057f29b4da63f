from __future__ import annotations

from pathlib import Path

from hardening.measure.records import CLEAN, Origin, Record
from hardening.measure.render import write_report
from hardening.measure.suite import RETURNED
from hardening.measure.tasks import GUARDED, SYSTEMS, UNDEFENDED

ORIGIN = Origin("toy/1", "f" * 64, "smoke", "twogate evaluate", "abc")


def measured(task: str, epsilons: tuple[float, ...]) -> list[Record]:
    """What the plots of one task show."""
    found = [ORIGIN.record("scores", "detector", task, CLEAN, [0.1, 0.2, 0.3], 3)]
    found += [ORIGIN.record("clean_acc", system, task, CLEAN, 0.9, 3) for system in (GUARDED, UNDEFENDED)]
    for epsilon in epsilons:
        found.append(ORIGIN.record("scores", "detector", task, "pgd", [0.4, 0.5, 0.6], 3, epsilon, 0))
        found += [ORIGIN.record("robust_acc", s, task, "pgd", 0.5, 3, epsilon, 0) for s in (GUARDED, UNDEFENDED)]
    return found


def tables(folder: Path, heading: str) -> list[list[list[str]]]:
    """The tables below a heading of the report, cell by cell, without their lines of dashes."""
    (section,) = [part for part in (folder / "report.md").read_text("utf-8").split("\n## ") if part.startswith(heading)]
    found = [block.splitlines() for block in section.split("\n\n") if block.startswith("| ")]
    return [[line[2:-2].split(" | ") for line in (lines[0], *lines[2:])] for lines in found]


def test_each_task_is_plotted_at_the_largest_of_its_own_budgets(tmp_path: Path) -> None:
    write_report([*measured("two", (8.0, 10.0)), *measured("one", (8.0,))], tmp_path)
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "ROC: two, eps 10/255" in report
    assert "ROC: one, eps 8/255" in report
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"{plot}-{task}.png" for plot in ("roc", "scores", "epsilon") for task in ("one", "two")
    }


def test_who_tries_every_attack_wins_where_one_of_them_does(tmp_path: Path) -> None:
    def knowing(attack: str, broken: list[float], seed: int = 0) -> list[Record]:
        share, table = sum(broken) / 4, "bundle's calibration"
        return [
            ORIGIN.record("robust_acc", GUARDED, "one", attack, 0.5, 5, 8.0, seed),
            ORIGIN.record("success@0.05", table, "one", attack, share, 4, 8.0, seed),
            ORIGIN.record("broken@0.05", table, "one", attack, broken, 4, 8.0, seed),
        ]

    records = [
        *measured("one", (8.0,)),
        *knowing("white box T2", [1, 0, 0, 0]),
        *knowing("white box T3", [0, 0, 1, 0]),
        *knowing("white box T2", [1, 0, 0, 0], seed=1),
        *knowing("white box T3", [1, 0, 0, 0], seed=1),
        *knowing("grey box T3", [0, 1, 0, 0]),
        *knowing("white box T10-T5", [1, 1, 1, 1]),  # a patch keeps to no budget
    ]
    write_report(records, tmp_path)
    lines = (tmp_path / "report.md").read_text("utf-8").splitlines()
    (row,) = [line for line in lines if "every attack |" in line]  # one attack alone needs no such row
    assert row.startswith("| one | white box every attack | 8 | 4 |")
    assert row.endswith("| - | 37.5 ± 17.7 | - |")


def test_an_attack_on_the_embedding_is_read_by_the_neighbours(tmp_path: Path) -> None:
    moved = [
        ORIGIN.record("robust_acc", GUARDED, "one", "white box T6-selective", 0.9, 5, 8.0),
        ORIGIN.record("knn_success@0.05", "bundle's calibration", "one", "white box T6-selective", 0.625, 4, 8.0),
    ]
    write_report([*measured("one", (8.0,)), *moved], tmp_path)
    (table,) = tables(tmp_path, "Attackers who know the method")
    assert table[0][-1] == "neighbours' class, at 0.05, %"
    assert table[1][:2] == ["one", "white box T6-selective"]
    assert table[1][-2:] == ["-", "62.5"]


def test_other_defences_that_the_attacker_knows(tmp_path: Path) -> None:
    name = "white box PGD-head"
    known = [
        ORIGIN.record("robust_acc", system, "one", name, value, 5, 8.0) for system, value in ((GUARDED, 0.1), ("MART", 0.3))
    ]
    write_report([*measured("one", (8.0,)), *known], tmp_path)
    ours, others = tables(tmp_path, "Attackers who know the method")
    assert [row[1] for row in ours[1:]] == [name]
    assert others[1:] == [["one", GUARDED, "8", "5", "10.0", "-"], ["one", "MART", "8", "5", "30.0", "-"]]


def test_persistence_cell_by_cell(tmp_path: Path) -> None:
    rates = {system: 0.95 - 0.125 * number for number, system in enumerate([GUARDED, *(s for s in SYSTEMS if s != GUARDED)])}
    records = [
        ORIGIN.record("robust/clean", system, "one", attack, rate - less, 9, epsilon)
        for system, rate in rates.items()
        for attack, epsilon, less in (("uap", 10.0, 0.063), ("pgd", 10.0, 0.032), ("pgd", 8.0, 0.0))
    ]
    write_report(records, tmp_path)
    (table,) = tables(tmp_path, "Persistent robustness")
    assert table == [
        ["attack", "eps", *SYSTEMS, "target"],
        ["pgd", "8", *(f"{rates[system]:.3f}" for system in SYSTEMS), "met"],
        ["pgd", "10", *(f"{rates[system] - 0.032:.3f}" for system in SYSTEMS), "met"],
        ["uap", "10", *(f"{rates[system] - 0.063:.3f}" for system in SYSTEMS), "missed by 1.3"],
    ]


def test_detection_cell_by_cell(tmp_path: Path) -> None:
    bundles = "bundle's calibration"
    found = [
        ("auroc", "detector", 0.987),
        ("tpr@0.001", bundles, 0.11),
        ("tpr@0.01", bundles, 0.22),
        ("tpr@0.05", bundles, 0.33),
        ("tpr_fooled@0.01", bundles, 0.44),
        ("tpr@0.01", "recalibrated", 0.93),
        ("tpr@0.001", "recalibrated", 0.66),
        # What other tables show.
        ("tpr@0.05", "recalibrated", 0.77),
        ("tpr_fooled@0.01", "recalibrated", 0.88),
    ]
    records = [ORIGIN.record(metric, subject, "one", "pgd", value, 9, 8.0) for metric, subject, value in found]
    records.append(ORIGIN.record("auroc", "detector", "one", "pgd", 0.5, 9, 10.0))
    write_report(records, tmp_path)
    (table,) = tables(tmp_path, "Detection")
    assert [name.removesuffix(", %") for name in table[0]] == [
        "task",
        "attack",
        "eps",
        "AUROC",
        "flagged at 0.001",
        "at 0.01",
        "at 0.05",
        "of fooled, at 0.01",
        "recalibrated, at 0.001",
        "recalibrated, at 0.01",
        "target AUROC",
        "target at 0.001",
        "target at 0.01",
    ]
    shares = ["11.0", "22.0", "33.0", "44.0", "66.0", "93.0"]
    verdicts = ["missed by 0.003", "missed by 14.0, recalibrated", "missed by 2.0, recalibrated"]
    assert table[1:] == [
        ["one", "pgd", "8", "0.987", *shares, *verdicts],
        ["one", "pgd", "10", "0.500", *["-"] * 6, "missed by 0.490", "-", "-"],
    ]


def test_false_alarms_cell_by_cell(tmp_path: Path) -> None:
    subjects, conditions, budgets = ("bundle's calibration", "recalibrated"), (CLEAN, "change: blur"), ("0.01", "0.05")
    records, rate = [], 0.0
    for subject in subjects:
        for condition in conditions:
            for task in ("one", "two"):
                for budget in budgets:
                    rate += 0.01
                    records.append(ORIGIN.record(f"fpr@{budget}", subject, task, condition, rate, 9))
    write_report(records, tmp_path)
    header = ["images", "one, at 0.01", "one, at 0.05", "two, at 0.01", "two, at 0.05"]
    assert tables(tmp_path, "Quiet") == [
        [header, ["clean", "1.0", "2.0", "3.0", "4.0"], ["blur", "5.0", "6.0", "7.0", "8.0"]],
        [header, ["clean", "9.0", "10.0", "11.0", "12.0"], ["blur", "13.0", "14.0", "15.0", "16.0"]],
    ]
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.index("### bundle's calibration") < text.index("| blur | 5.0") < text.index("### recalibrated")


def test_the_returned_embedding_cell_by_cell(tmp_path: Path) -> None:
    records, value = [], 0.0
    for attack, epsilon in ((CLEAN, 0.0), ("pgd", 8.0), ("pgd", 10.0), ("white box T2", 8.0)):
        for metric in ("knn_acc", "recall@10"):
            for subject in (RETURNED, UNDEFENDED):
                value += 0.05
                records.append(ORIGIN.record(metric, subject, "one", attack, value, 9, epsilon))
    write_report(records, tmp_path)
    header = ["task", "attack", "eps", "knn_acc, returned", "knn_acc, undefended"]
    assert tables(tmp_path, "The returned embedding") == [
        [
            [*header, "recall@10, returned", "recall@10, undefended"],
            ["one", "clean", "", "5.0", "10.0", "15.0", "20.0"],
            ["one", "pgd", "8", "25.0", "30.0", "35.0", "40.0"],
            ["one", "pgd", "10", "45.0", "50.0", "55.0", "60.0"],
        ]
    ]
