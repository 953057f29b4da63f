from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Gauge

from service.engine.admission import Allowance


@pytest.fixture
def allowance() -> Allowance:
    return Allowance(3, Gauge("taken", "x", registry=CollectorRegistry()))


def test_all_or_nothing(allowance: Allowance) -> None:
    assert allowance.take(2)
    assert not allowance.take(2)
    assert allowance.taken == 2
    assert allowance.take(1)
    allowance.give(3)
    assert allowance.taken == 0


def test_held_gives_back_what_it_took_and_nothing_else(allowance: Allowance) -> None:
    def work() -> None:
        with allowance.held(3) as granted:
            assert granted
            with allowance.held(1) as refused:
                assert not refused
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert allowance.taken == 0
