from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model_store.calibration import BudgetTooSmall, Calibration, copies_of, images_for
from model_store.errors import TwogateError

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


def calibration(values: list[float]) -> Calibration:
    return Calibration(source="test", scores=tuple(sorted(values)))


@given(scores, st.floats(-1e6, 1e6))
def test_p_is_the_share_of_clean_images_at_least_as_suspicious(values: list[float], score: float) -> None:
    expected = (1 + sum(value >= score for value in values)) / (len(values) + 1)
    assert calibration(values).p_value(score) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.02, 0.05, 0.3])
def test_threshold_is_the_largest_score_that_passes(budget: float) -> None:
    fewest = images_for(budget)
    for n in (fewest, 2 * fewest + 1):
        table = calibration([float(i) for i in range(n)])
        limit = table.threshold(budget)
        assert table.p_value(limit + 1e-6) <= budget < table.p_value(limit)
    with pytest.raises(BudgetTooSmall):
        calibration([0.0] * (fewest - 1)).threshold(budget)


@given(scores, st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_more_suspicious_image_never_has_a_larger_p(values: list[float], score: float, more: float) -> None:
    table = calibration(values)
    assert table.p_value(score + more) <= table.p_value(score)


def test_fresh_clean_images_are_flagged_no_more_often_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        table = calibration(rng.normal(size=999).tolist())
        p = table.p_value(rng.normal(size=500))
        rates.append([(p <= budget).mean() for budget in (0.001, 0.01, 0.05, 0.5)])
    # 100,000 fresh images: the standard error is below 0.0005 for the first three (and the tables differ).
    assert np.mean(rates, axis=0) == pytest.approx([0.001, 0.01, 0.05, 0.5], abs=0.004)
    assert np.mean(rates, axis=0)[0] < 0.002


def test_p_values_of_the_calibration_images_themselves_are_uniform() -> None:
    table = calibration(list(np.random.default_rng(1).normal(size=99)))
    assert np.sort(table.p_value(table.scores)) == pytest.approx(np.arange(2, 101) / 100)


def test_ties_count_as_at_least_as_suspicious() -> None:
    assert calibration([1.0] * 9).p_value(1.0) == 1.0
    assert calibration([1.0] * 9).p_value(1.0 + 1e-9) == 0.1


def test_scores_that_are_not_numbers() -> None:
    table = calibration([0.0] * 99)
    assert table.p_value([np.nan, np.inf, -np.inf]) == pytest.approx([0.01, 0.01, 1.0])


def test_shape_is_kept() -> None:
    assert calibration([0.0]).p_value(np.zeros((2, 3))).shape == (2, 3)


@pytest.mark.parametrize(("n", "budget"), [(999, 0.001), (99, 0.01), (19, 0.05), (1200, 0.001)])
def test_a_budget_that_the_images_support_is_accepted(n: int, budget: float) -> None:
    table = calibration([0.0] * n)
    table.require_budget(budget)
    assert table.p_value(1.0) <= budget  # so that something can be flagged at all


@pytest.mark.parametrize(("n", "budget", "needed"), [(998, 0.001, 999), (98, 0.01, 99), (1200, 0.0001, 9999)])
def test_a_budget_that_is_too_small_is_refused_in_words(n: int, budget: float, needed: int) -> None:
    with pytest.raises(BudgetTooSmall, match=f"needs at least {needed} calibration images, this bundle has {n}"):
        calibration([0.0] * n).require_budget(budget)


@pytest.mark.parametrize("budget", [0.0, -0.01, 1.0, 7.0, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(TwogateError, match="between 0 and 1"):
        calibration([0.0] * 999).require_budget(budget)


@pytest.mark.parametrize("values", [(), (2.0, 1.0), (0.0, float("nan")), (float("inf"),)])
def test_a_table_that_is_none_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        Calibration(source="test", scores=values)


def test_a_raised_table_is_quiet_on_each_change_and_on_clean_images() -> None:
    rng, budgets = np.random.default_rng(0), (0.001, 0.01, 0.05, 0.2)
    rates = []
    for _ in range(200):
        changed = {"louder": rng.normal(1, 1, 500), "wider": rng.normal(0, 1.5, 500), "quieter": rng.normal(-1, 1, 500)}
        table = Calibration.of("test", rng.normal(size=999), changed)
        fresh = (rng.normal(size=500), rng.normal(1, 1, 500), rng.normal(0, 1.5, 500), rng.normal(-1, 1, 500))
        rates.append([[(table.p_value(score) <= budget).mean() for budget in budgets] for score in fresh])
    clean, louder, wider, quieter = np.mean(rates, axis=0)
    # 100,000 fresh images of each: the standard error of a share of 0.002 is 0.0002, and the tables differ.
    most = 2 * np.array(budgets) * 1.05 + 0.0003
    assert (np.maximum(louder, wider)[1:] <= most[1:]).all(), (louder, wider)
    assert (louder + wider + quieter)[0] / 3 <= most[0]
    assert (clean <= budgets).all()
    assert (quieter <= clean).all()
    # Not much quieter than it must be: one change or the other has most of its share.
    assert (np.maximum(louder, wider) >= 1.2 * np.array(budgets)).all()


@pytest.mark.parametrize("n", [19, 99, 100, 999])
def test_changes_that_are_no_louder_leave_the_table_as_it_is(n: int) -> None:
    values = np.random.default_rng(2).normal(size=n)
    table = Calibration.of("test", values, {"the same": values, "quieter": values[::2] - 1e3})
    assert table.scores == Calibration.of("test", values).scores == tuple(np.sort(values))
    assert table.changes == ("the same", "quieter")
    assert Calibration.of("test", values).changes == ()


def test_single_copies_of_a_kind_do_not_decide() -> None:
    loud = np.zeros(500)
    loud[:4] = 9.0
    table = Calibration.of("test", np.zeros(999), {"one": loud, "another": np.zeros(500), "third": np.zeros(500)})
    # Four copies of 500 are above at 0.004, which the kind does not decide; of all 1,500 they are as many at 0.0014.
    assert table.p_value([9.5, 9.0, 8.0]) == pytest.approx([0.001, 0.002, 0.002])
    loud[4] = 9.0
    table = Calibration.of("test", np.zeros(999), {"one": loud, "another": np.zeros(500), "third": np.zeros(500)})
    assert table.p_value([9.5, 9.0, 8.0]) == pytest.approx([0.001, 0.006, 0.006])


@pytest.mark.parametrize("n", [99, 250, 1000])
def test_from_where_on_each_kind_alone_is_promised(n: int) -> None:
    """One loud kind among quiet ones: it alone keeps twice a budget from there on, and not at half of that."""
    rng, kept = np.random.default_rng(0), []
    alone = Calibration(source="", scores=(0.0,) * n, changes=("x",)).each_alone_from
    assert alone == pytest.approx(5 / (2 * (copies_of(n) + 1)))
    for _ in range(300):
        changed = {"loud": rng.normal(2, 1, copies_of(n)), **{str(kind): rng.normal(size=copies_of(n)) for kind in range(8)}}
        table = Calibration.of("test", rng.normal(size=n), changed)
        fresh = table.p_value(rng.normal(2, 1, 400))
        kept.append([(fresh <= budget).mean() / (2 * budget) for budget in (alone + 1e-9, alone / 2)])
    at, below = np.mean(kept, axis=0)
    assert at <= 1.05
    assert below > 1.5
    assert f"each alone from max_fpr {alone:.2g} on" in table.words


def test_a_budget_that_the_copies_cannot_bound_has_their_highest_score() -> None:
    table = Calibration.of("test", np.zeros(999), {"few": np.arange(19.0)})
    # A fresh copy is above the highest of 19 once in 20 times, above the second highest twice.
    assert table.p_value([18.5, 18.0, 17.5, 17.0]) == pytest.approx([0.001, 0.05, 0.05, 0.075])
