from __future__ import annotations

from pathlib import Path

from hardening.measure.records import CLEAN, Origin, Record
from hardening.measure.render import write_report
from hardening.measure.tasks import GUARDED, UNDEFENDED

ORIGIN = Origin("toy/1", "f" * 64, "smoke", "twogate evaluate", "abc")


def measured(task: str, epsilons: tuple[float, ...]) -> list[Record]:
    """What the plots of one task show."""
    found = [ORIGIN.record("scores", "detector", task, CLEAN, [0.1, 0.2, 0.3], 3)]
    found += [ORIGIN.record("clean_acc", system, task, CLEAN, 0.9, 3) for system in (GUARDED, UNDEFENDED)]
    for epsilon in epsilons:
        found.append(ORIGIN.record("scores", "detector", task, "pgd", [0.4, 0.5, 0.6], 3, epsilon, 0))
        found += [ORIGIN.record("robust_acc", s, task, "pgd", 0.5, 3, epsilon, 0) for s in (GUARDED, UNDEFENDED)]
    return found


def test_each_task_is_plotted_at_the_largest_of_its_own_budgets(tmp_path: Path) -> None:
    write_report([*measured("two", (8.0, 10.0)), *measured("one", (8.0,))], tmp_path)
    report = (tmp_path / "report.md").read_text()
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
    ]
    write_report(records, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    (row,) = [line for line in lines if "every attack |" in line]  # one attack alone needs no such row
    assert row.startswith("| one | white box every attack | 8 | 4 |")
    assert row.endswith("| - | 37.5 ± 17.7 |")
