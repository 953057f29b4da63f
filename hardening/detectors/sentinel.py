"""Consistency, and beside it a network that was trained to see perturbations.

Consistency knows clean images alone, and sees what moves the tripwire. A universal perturbation moves it no more than a busy
picture does, but has the same pattern in every picture, and PGD leaves its own; a network that has seen such patterns knows
them anywhere ("On detecting adversarial perturbations", Metzen et al., ICLR 2017). What that network has not seen, it may
miss; consistency asks less. So each has a voice: the alarm of the network (`hardening.sentinel`) is evidence like any other,
with its normal score and conformal p-value among the same honest images, and a twentieth of the false alarms: it is sure
of an attack that it knows, and what it half believes of is mostly an honest picture under noise, blurred or in few colours
(`docs/tried.md`). Thresholds, as always, come from clean images alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hardening.branches import BMP, BRANCHES, SENTINEL, TRIPWIRE
from hardening.detectors.consistency import ALARM, ConsistencyDetector


class SentinelDetector(ConsistencyDetector):
    """See the module's text. `fit` makes one from clean features, the sentinel's answer [N, 1] among them."""

    name = "sentinel"
    description = f"{ConsistencyDetector.description}, of a network that was trained to see perturbations, too"
    views = (*ConsistencyDetector.views, SENTINEL)
    branches = (*BRANCHES, TRIPWIRE, SENTINEL)
    shares: Mapping[str, float] = {TRIPWIRE: 0.85, BMP: 0.1, SENTINEL: 0.05}
    plain: ClassVar[Mapping[str, tuple[str, ...]]] = {**ConsistencyDetector.plain, SENTINEL: (ALARM,)}
