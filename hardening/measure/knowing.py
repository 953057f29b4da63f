"""Attacks by somebody who knows the method (T1 to T11, docs/measure.md), aimed at a bundle's own graph, or at a surrogate's.

White box: the bundle itself, heads included. Grey box: the attacker ran the same code on similar data and aims at what he
got, heads of his own included (T8); what he finds is measured on the real bundle, whose weights he lacks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardening.attacks.adaptive import ADAPTIVE, Attack, ensemble_universal
from hardening.attacks.features import to_uint8
from hardening.attacks.head_aware import auto_attack_without_fab, pgd_head
from hardening.attacks.target import Seen, Target
from hardening.encoders import as_input
from hardening.graph import Graph
from hardening.measure.tasks import GUARDED, Task
from hardening.progress import Bars
from model_store.calibration import Calibration
from model_store.errors import TwogateError
from model_store.manifest import Manifest

AIMED_AT_FPR = 0.05
"""The attacker holds the score under the threshold of this budget, if not told another; a smaller one is then evaded too."""
HEAD_AWARE = "PGD-head"
_THROUGH_HEADS: dict[str, Attack] = {HEAD_AWARE: pgd_head, "AutoAttack-no-FAB": auto_attack_without_fab}
"""These ignore the flag: they tell what is left of the accuracy alone."""
_RUNS = {**_THROUGH_HEADS, **ADAPTIVE}
MIXTURE = "@mixture"
"""Behind an attack's name: it is made through the equal mixture of the branches' probabilities instead of the fusion that is
served. No branch outshouts the others there, so all must be broken, and what breaks them may carry over better."""
_MIXED = tuple(f"{name}{MIXTURE}" for name in (HEAD_AWARE, "T4", "T5-selective"))
KNOWING = (*_RUNS, *_MIXED)
_OPTIONS = re.compile(r"(?:@fpr(?P<fpr>0\.\d+))?(?:@(?P<steps>\d+))?$")
"""Behind that: the budget that is aimed at, and as many steps as are tried, in place of the size's:
`T5-selective@fpr0.2@200`. Who lacks the weights keeps a margin; who aims at a strict service has more room."""
_BATCH = 50
_BYTES_PER_PIXEL = 20_000
"""Of all images of a batch together: what the whole defence takes with its gradients."""
_BYTES = 3_000_000_000
"""On a CPU; of an accelerator's memory a tenth. Not of what is free just now: numbers would follow it, by the batch."""


@dataclass(frozen=True)
class _Aim:
    """An attack's name, read."""

    kind: str
    """Of KNOWING."""
    fpr: float
    steps: int | None

    @classmethod
    def read(cls, name: str) -> _Aim:
        options = _OPTIONS.search(name)
        assert options is not None  # it also matches nothing at the end
        fpr, steps = options["fpr"], options["steps"]
        return cls(name[: options.start()], float(fpr or AIMED_AT_FPR), int(steps) if steps else None)

    @property
    def blind(self) -> bool:
        """Whether it ignores the flag."""
        return self.kind.removesuffix(MIXTURE) in _THROUGH_HEADS


def check_names(names: tuple[str, ...]) -> None:
    """TwogateError where a name is not in the suite."""
    for name in names:
        aim = _Aim.read(name)
        if aim.kind not in KNOWING or aim.steps == 0 or aim.fpr == 0 or (aim.blind and "@fpr" in name):
            raise TwogateError(
                f"there is no adaptive attack {name!r}; there are {', '.join(KNOWING)}, each with a number of steps, as in "
                f"{HEAD_AWARE}@200, and those that mind the flag with the budget that they aim at, as in T5-selective@fpr0.2"
            )


def check_budgets(names: tuple[str, ...], calibration: Calibration) -> None:
    """BudgetTooSmall where a bundle has too few calibration images for a budget that an attack aims at."""
    for name in names:
        calibration.require_budget(_Aim.read(name).fpr)


def fewer_steps(name: str, steps: int, share: float) -> str:
    """The name of the same attack with a share of its steps, at least one; `steps` are those of a name that says none."""
    aim = _Aim.read(name)
    kind = name.removesuffix(f"@{aim.steps}") if aim.steps else name
    return f"{kind}@{max(1, round(share * (aim.steps or steps)))}"


def target_of(graph: Graph, task: Task, manifest: Manifest, attack: str) -> Target:
    """The whole defence as an attack sees it, differentiable: the graph, and a task's heads, fused as it wants them.

    One that ignores the flag gets no numbers for it and for the features, which saves the undefended victim's passes.
    """
    aim = _Aim.read(attack)
    mixture, blind = aim.kind.endswith(MIXTURE), aim.blind
    by_branch = {} if blind else graph.feature_names
    wanted = (*by_branch.values(), "embedding", "confidence", *(() if blind else ("score",)))

    def see(images: Tensor) -> Seen:
        found = graph(images, wanted)
        logits = task.served_logits(found["embedding"])
        mixed = logits.log_softmax(dim=2).logsumexp(dim=1)
        return Seen(
            embedding=found["embedding"],
            confidence=found["confidence"],
            score=logits.new_full((len(logits),), math.nan) if blind else found["score"],
            features={branch: found[value] for branch, value in by_branch.items()},
            logits=logits,
            fused=mixed if mixture else task.system_logits(found, manifest)[GUARDED],
        )

    return Target(see, manifest.calibration.threshold(aim.fpr))


def attack_knowing(
    name: str,
    target: Target,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    epsilon: float,
    steps: int,
    restarts: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.uint8]:
    """Attack images [N, H, W, 3] uint8 with labels [N]; `epsilon` in 1/255. Returns uint8, clipped and rounded.

    A number of steps in `name` goes before `steps`.
    """
    generator = torch.Generator().manual_seed(seed)
    aim = _Aim.read(name)
    run, parts = _RUNS[aim.kind.removesuffix(MIXTURE)], []
    room = _BYTES if device == "cpu" else torch.cuda.get_device_properties(device).total_memory // 10
    batch = max(1, min(_BATCH, room // (_BYTES_PER_PIXEL * images.shape[1] * images.shape[2])))
    if run is ensemble_universal:
        # One perturbation for all of them, and made on them, which favours the attacker.
        run, batch = partial(ensemble_universal, chunk=batch), len(images)
    with bars.task(f"attack {name}", len(images)) as task:
        for start in range(0, len(images), batch):
            x = as_input(images[start : start + batch], device)
            y = torch.as_tensor(labels[start : start + batch], device=device)
            common: Any = {"steps": aim.steps or steps, "restarts": restarts, "generator": generator}
            found = run(target, x, y, epsilon=epsilon / 255, **common)
            parts.append(to_uint8(found.detach()))
            task.advance(len(x))
    return np.concatenate(parts)
