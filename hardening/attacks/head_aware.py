"""Attacks through a task's heads that ignore the flag: what robust accuracy means when the attacker knows everything.

`auto_attack_without_fab` holds the parts of AutoAttack (Croce and Hein 2020) that matter most: APGD with cross-entropy, APGD
with the targeted DLR loss, and Square. Written here because no package fits: `autoattack` is not on PyPI; torchattacks 3.5.1
pins a `requests` of 2021; pyautoattack 0.2.0 (December 2024, no release since) raises IndexError below four classes, seeds
torch's global generator, and judges candidates before they are rounded to 8 bits. FAB, which looks for the smallest
perturbation that is enough, is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hardening.attacks import blackbox
from hardening.attacks.adaptive import Best, Box, Campaign, gradient_of, margin, raising
from hardening.attacks.features import to_uint8
from hardening.attacks.target import Seen, Target
from hardening.encoders import as_input

Loss = Callable[[Tensor, Tensor], Tensor]
"""Fused logits [N, C] and labels [N] -> [N], to be raised."""
_MOMENTUM = 0.75
_IMPROVING = 0.75


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[N]."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over (first - third largest), which no scaling of the logits changes.

    With two classes there is no third, and the margin is left as it is.
    """
    wrong = margin(logits, labels)
    if logits.shape[1] < 3:
        return wrong
    ordered = logits.topk(3, dim=1).values
    return wrong / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """DLR towards class `wanted` [N]: over (first - mean of third and fourth); the plain margin below four classes."""
    rows = torch.arange(len(logits), device=logits.device)
    wrong = logits[rows, wanted] - logits[rows, labels]
    if logits.shape[1] < 4:
        return wrong
    ordered = logits.topk(4, dim=1).values
    return wrong / (ordered[:, 0] - ordered[:, 2:].mean(dim=1) + 1e-12)


def pgd_head(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    loss: Literal["both", "ce", "dlr"] = "both",
) -> Tensor:
    """PGD on the fused logits: cross-entropy, DLR, or each in turn; kept is what is wrong by the largest margin."""
    campaign = _open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    truth = campaign.require_labels()
    losses: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}
    for name, function in losses.items():
        if loss in ("both", name):
            campaign.run(
                raising(lambda seen, function=function: function(seen.require_fused(), truth)),  # type: ignore[misc]
                _wrong(truth),
            )
    return campaign.best.images


def apgd(
    target: Target,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    best: Best | None = None,
) -> Best:
    """One run of Auto-PGD: momentum, and a step that halves when it stops paying, from the best point so far.

    Every picture is judged as stored in 8 bits; `best` is improved by what is wrong by a larger margin.
    """
    box, judge = Box.ball(images, epsilon), _wrong(labels)
    if best is None:
        with torch.no_grad():
            best = Best(images, *judge(target.see(images)))

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        z = box.stored(x).requires_grad_()
        seen = target.see(z)
        best.offer(z.detach(), *judge(seen.detach()))
        value = loss(seen.require_fused(), labels)
        return value.detach(), gradient_of(value, z).sign()

    checkpoints = _checkpoints(steps)
    x = box.start(generator)
    value, sign = look(x)
    top, top_value, top_sign = x, value, sign
    before = x
    step = torch.full((len(x), 1, 1, 1), 2 * epsilon, device=x.device)
    risen, halved, last_top = torch.zeros_like(value), torch.zeros_like(value, dtype=torch.bool), top_value
    since = 0
    for number in range(1, steps + 1):
        z = box.project(x + step * sign)
        keep = 1.0 if number == 1 else _MOMENTUM
        x, before = box.project(x + keep * (z - x) + (1 - keep) * (x - before)), x
        was = value
        value, sign = look(x)
        risen += value > was
        better = (value > top_value)[:, None, None, None]
        top, top_sign, top_value = (
            torch.where(better, x, top),
            torch.where(better, sign, top_sign),
            torch.maximum(value, top_value),
        )
        since += 1
        if number in checkpoints:
            halve = (risen < _IMPROVING * since) | (~halved & (last_top == top_value))
            here = halve[:, None, None, None]
            step = torch.where(here, step / 2, step)
            x, sign, value = (
                torch.where(here, top, x),
                torch.where(here, top_sign, sign),
                torch.where(halve, top_value, value),
            )
            before = torch.where(here, x, before)
            risen, halved, last_top, since = torch.zeros_like(value), halve, top_value, 0
    return best


def auto_attack_without_fab(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    classes: int = 9,
) -> Tensor:
    """APGD by cross-entropy, then by targeted DLR to the `classes` likeliest wrong ones, then Square; each on what stands.

    Square has 50 queries for each step: as published, 5000 beside 100 steps.
    """
    campaign = _open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    truth, best = campaign.require_labels(), campaign.best
    order = campaign.clean.require_fused().argsort(dim=1, descending=True)
    others = order[order != truth[:, None]].view(len(images), -1)

    def attack(loss: Callable[[Tensor], Loss]) -> None:
        standing = torch.nonzero(~best.success).flatten()
        if len(standing):
            part = Best(best.images[standing], best.success[standing], best.merit[standing])
            found = apgd(
                target,
                images[standing],
                truth[standing],
                loss(standing),
                epsilon=epsilon,
                steps=steps,
                generator=generator,
                best=part,
            )
            _put(best, standing, found)

    for _ in range(restarts):
        attack(lambda _: cross_entropy)
    for rank in range(min(classes, others.shape[1])):

        def towards(standing: Tensor, rank: int = rank) -> Loss:
            wanted = others[standing, rank]
            return lambda logits, own: targeted_dlr(logits, own, wanted)

        for _ in range(restarts):
            attack(towards)
    standing = torch.nonzero(~best.success).flatten()
    if len(standing):
        seed = int(torch.randint(2**31, (1,), generator=generator))
        device = str(images.device)

        @torch.no_grad()
        def query(pixels: NDArray[np.uint8], which: NDArray[np.intp]) -> NDArray[np.float64]:
            own = truth[standing][torch.as_tensor(which, device=truth.device)]
            return -margin(target.see(as_input(pixels, device)).require_fused(), own).double().cpu().numpy()

        result = blackbox.square(
            query, to_uint8(images[standing]), epsilon=epsilon * 255 + 1e-4, queries=50 * steps, seed=seed
        )
        loss = torch.as_tensor(-result.loss, dtype=best.merit.dtype, device=images.device)
        _put(best, standing, Best(as_input(result.images, device), loss > 0, loss))
    return best.images


def _open(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int,
) -> Campaign:
    """A campaign whose clean images are ranked by the prediction alone."""
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    campaign.clean.require_fused()
    campaign.best.success, campaign.best.merit = _wrong(campaign.require_labels())(campaign.clean)
    return campaign


def _wrong(labels: Tensor) -> Callable[[Seen], tuple[Tensor, Tensor]]:
    def judge(seen: Seen) -> tuple[Tensor, Tensor]:
        wrong = margin(seen.require_fused(), labels)
        return wrong > 0, wrong

    return judge


def _put(best: Best, rows: Tensor, found: Best) -> None:
    """Offer what was found for some of the images."""
    images, success, merit = best.images.clone(), best.success.clone(), best.merit.clone()
    images[rows], success[rows], merit[rows] = found.images, found.success, found.merit
    best.offer(images, success, merit)


def _checkpoints(steps: int) -> set[int]:
    """After how many steps Auto-PGD looks back: 22 % first, then ever shorter, down to 6 %."""
    shares, found = [0.0, 0.22], set()
    while shares[-1] < 1:
        found.add(math.ceil(round(shares[-1] * steps, 6)))
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return found
