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
