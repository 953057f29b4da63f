from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
from numpy.typing import NDArray

from hardening.measure.oblivious import kept


def test_what_two_want_at_a_time_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []
    begun, go_on = Event(), Event()

    def make() -> dict[str, NDArray[np.int64]]:
        made.append(len(made))
        begun.set()
        go_on.wait(20)
        return {"made": np.array(made)}

    file = tmp_path / "below" / "kept.npz"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept, file, make)
        assert begun.wait(20)
        second = pool.submit(kept, file, make)
        time.sleep(0.3)  # enough to begin, were there nothing to wait for
        go_on.set()
        assert first.result(20)["made"].tolist() == second.result(20)["made"].tolist() == [0]
    assert made == [0]
