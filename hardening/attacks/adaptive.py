"""Attacks by somebody who knows the method, T1 to T6 and T9 to T11 of docs/measure.md.

All are one search (`search`) with different directions: projected steps from random starts, where every picture on the way is
judged as a file would store it, rounded to 8 bits, and the best of each image is kept. Best is first of all "the prediction
is wrong and the score is not above the threshold", then the margin by which it is wrong. Step sizes follow a schedule that
does not depend on the number of steps, so more steps only add candidates: they are never worse on any image. Nor are more
restarts where an attack is one search; several share one generator, and start elsewhere with more.

Losses are margins of logits, log-odds and distances, not probabilities: those have no gradient once they reach 0 or 1.

T8, surrogate heads, is no code of its own: build a Target whose `logits` and `fused` come from heads that the attacker
trained on data of his own (or from a whole surrogate bundle), run any attack here on it, and measure what it returns on the
real defence. T7, which sees answers alone, is in `blackbox`.

The score may be flat: tables of -log p are zero below their first knot, and a maximum passes the gradient of one piece of
evidence alone. Individual evidence is not shown, so `quiet` adds to the score, faintly, what Seen does show: the branches'
-log confidence, each of which follows that branch's own evidence, and the distance from the clean features, where the score
is known to be low. It decides the direction only where the score has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hardening.attacks.target import Seen, Target
from hardening.branches import BMP, BRANCHES, MPAE

LAMBDAS = (0.1, 1.0, 10.0, 100.0)
DISTANCE_LAMBDAS = (0.01, 0.1, 1.0)
"""A distance is at most 2, where a margin of logits may be tens."""
MARGINS = (0.05, 5.0)
DISTANCES = (0.6, 1.2)
"""How much of the first aim is wanted before the score is turned to. From just over a boundary the score's gradient leads
straight back; from deep behind it there is a way down on the other side."""
KAPPA = 0.05
"""How far below the threshold the score is driven."""
_BMP = BRANCHES.index(BMP)
_FAINT = 1e-3
_SURE = 3.0
"""Log-odds at which a branch counts as convinced, and effort goes to the others."""
_NEAR = 0.1
_CHUNK = 64

Direction = Callable[[Tensor, Seen], Tensor]
"""Pixels [N, 3, H, W] and what was seen of them -> where to step; 1 is a whole step."""
Judge = Callable[[Seen], tuple[Tensor, Tensor]]
"""What was seen -> (success [N] bool, merit [N])."""
Value = Callable[[Seen], Tensor]
"""What was seen -> one value per image [N], to be raised."""
Aim = Literal["margin", "distance"]
"""Damage: the margin of the fused logits, or the distance of the returned embedding from the clean one."""


class Attack(Protocol):
    """One attack of the suite."""

    def __call__(
        self, target: Target, images: Tensor, labels: Tensor | None, *, epsilon: float, steps: int, generator: torch.Generator
    ) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] -> adversarial images, at most `epsilon` away (patches apart), in 8-bit values.

        Without `labels` [N] the clean prediction is taken for the truth.
        """
        raise AssertionError("a protocol")


@dataclass
class Best:
    """The best candidate of each image so far."""

    images: Tensor
    success: Tensor
    merit: Tensor

    def offer(self, images: Tensor, success: Tensor, merit: Tensor) -> None:
        """Take each image that beats what is there: a success before none, then by merit; NaN never wins."""
        better = (success & ~self.success) | ((success == self.success) & (merit > self.merit))
        self.images = torch.where(better[:, None, None, None], images, self.images)
        self.success = torch.where(better, success, self.success)
        self.merit = torch.where(better, merit, self.merit)


@dataclass(frozen=True)
class Box:
    """Where pixels may go: between `low` and `high`; `radius` is half the free width."""

    low: Tensor
    high: Tensor
    radius: float

    @classmethod
    def ball(cls, images: Tensor, epsilon: float) -> Box:
        """All pixels, at most `epsilon` away."""
        return cls((images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1), epsilon)

    @classmethod
    def patch(cls, images: Tensor, share: float = 0.03) -> Box:
        """A square of that share of the image, any colours; placed as AdvEncoder places it, 7/32 in from the lower right."""
        height, width = images.shape[2:]
        side = max(1, math.floor(math.sqrt(share * height * width)))
        bottom, right = height - height * 7 // 32, width - width * 7 // 32
        low, high = images.clone(), images.clone()
        low[:, :, bottom - side : bottom, right - side : right] = 0
        high[:, :, bottom - side : bottom, right - side : right] = 1
        return cls(low, high, 0.5)

    def project(self, images: Tensor) -> Tensor:
        """The nearest point of the box."""
        return torch.minimum(torch.maximum(images, self.low), self.high)

    def stored(self, images: Tensor) -> Tensor:
        """Rounded to 8 bits; a box that is not made of 8-bit values goes before."""
        return self.project((images * 255).round() / 255)

    def start(self, generator: torch.Generator, spread: float = 1.0) -> Tensor:
        """Somewhere in the box, uniformly; with a smaller `spread` nearer its middle."""
        chance = torch.rand(self.low.shape, generator=generator).to(self.low.device)
        return (self.low + self.high) / 2 + spread * (chance - 0.5) * (self.high - self.low)


def step_size(step: int) -> float:
    """In units of the radius: from a quarter down to a two-hundredth. Does not depend on how many steps there are."""
    return max(0.25 / (1 + step / 5), 0.005)


def search(
    target: Target,
    direction: Direction,
    judge: Judge,
    box: Box,
    best: Best,
    *,
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> Best:
    """Improve `best` by following `direction` from random starts, every other one near the clean image.

    Much of a ball is noise that any detector sees; the first start is near, where the score is still low.
    The gradient is taken at the stored picture and applied to the unrounded one, so small steps add up.
    """
    for restart in range(restarts):
        x = box.start(generator, _NEAR if restart % 2 == 0 else 1.0)
        for step in range(steps + 1):
            z = box.stored(x).requires_grad_()
            with torch.set_grad_enabled(step < steps):
                seen = target.see(z)
            best.offer(z.detach(), *judge(seen.detach()))
            if step < steps:
                x = box.project(x + step_size(step) * box.radius * direction(z, seen))
    return best


def gradient_of(values: Tensor, pixels: Tensor) -> Tensor:
    """Of each image's own value [N] with respect to its pixels; zero where there is none."""
    if not values.requires_grad:
        return torch.zeros_like(pixels)
    (gradient,) = torch.autograd.grad(values.sum(), pixels, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.nan_to_num(gradient, 0.0, 0.0, 0.0)


def raising(value: Value) -> Direction:
    """The sign of the gradient of `value`."""
    return lambda pixels, seen: gradient_of(value(seen), pixels).sign()


def orthogonal(gradient: Tensor, other: Tensor) -> Tensor:
    """`gradient` less its component along `other`, image by image: [N, 3, H, W]."""
    g, o = gradient.flatten(1), other.flatten(1)
    along = (g * o).sum(dim=1, keepdim=True) / o.square().sum(dim=1, keepdim=True).clamp_min(1e-30)
    return (g - along * o).view_as(gradient)


def switching(value: Value, suspicion: Value, unsatisfied: Value, *, project: bool) -> Direction:
    """Bryniarski et al. 2021: raise `value` where `unsatisfied` is positive, else lower `suspicion`.

    With `project` the step has no component along the gradient of the other one, and keeps that property: its size is set by
    its mean, where the sign of each value would turn it.
    """

    def direction(pixels: Tensor, seen: Seen) -> Tensor:
        up, down = gradient_of(value(seen), pixels), -gradient_of(suspicion(seen), pixels)
        first = (unsatisfied(seen).detach() > 0)[:, None, None, None]
        if not project:
            return torch.where(first, up, down).sign()
        step = torch.where(first, orthogonal(up, down), orthogonal(down, up))
        return step / step.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)

    return direction


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit less that of the label, over the last dimension: positive = wrong. [..., C] -> [...]."""
    own = F.one_hot(labels, logits.shape[-1]).bool()
    own = own.view(len(labels), *[1] * (logits.dim() - 2), -1).expand_as(logits)
    return logits.masked_fill(own, -math.inf).amax(dim=-1) - logits.masked_fill(~own, 0).sum(dim=-1)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of the label, without ever forming p. [..., C] -> [...]."""
    own = F.one_hot(labels, logits.shape[-1]).bool()
    own = own.view(len(labels), *[1] * (logits.dim() - 2), -1).expand_as(logits)
    return logits.masked_fill(~own, 0).sum(dim=-1) - logits.masked_fill(own, -math.inf).logsumexp(dim=-1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos, [N, d] -> [N]."""
    return 1 - F.cosine_similarity(a, b, dim=1)


@dataclass(frozen=True)
class Campaign:
    """What all attacks on one batch share: the target, what it says of the clean images, and how hard to try."""

    target: Target
    clean: Seen
    labels: Tensor | None
    box: Box
    best: Best
    steps: int
    restarts: int
    generator: torch.Generator

    @classmethod
    def open(
        cls,
        target: Target,
        images: Tensor,
        labels: Tensor | None,
        *,
        epsilon: float,
        steps: int,
        generator: torch.Generator,
        restarts: int,
    ) -> Campaign:
        """Begin with the clean images as the best so far."""
        with torch.no_grad():
            clean = target.see(images)
        if labels is None and clean.fused is not None:
            labels = clean.fused.argmax(dim=1)
        nothing = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        worst = torch.full((len(images),), -math.inf, device=images.device)
        found = cls(
            target,
            clean,
            labels,
            Box.ball(images, epsilon),
            Best(images, nothing, worst),
            steps,
            restarts,
            generator,
        )
        found.best.offer(images, *found.judge(clean))
        return found

    def require_labels(self) -> Tensor:
        """The labels, or NeedsHeads."""
        if self.labels is None:
            return self.clean.require_fused().argmax(dim=1)
        return self.labels

    def judge(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Wrong and not flagged, then the margin; without heads: not flagged, then the returned embedding's distance."""
        unflagged = seen.score <= self.target.threshold
        if seen.fused is None:
            return unflagged, distance(seen.embedding, self.clean.embedding)
        wrong = margin(seen.fused, self.require_labels())
        return unflagged & (wrong > 0), wrong

    def run(self, direction: Direction, judge: Judge | None = None) -> None:
        """Search once; what is better is kept in `best`."""
        search(
            self.target,
            direction,
            judge or self.judge,
            self.box,
            self.best,
            steps=self.steps,
            restarts=self.restarts,
            generator=self.generator,
        )

    def quiet(self, seen: Seen) -> Tensor:
        """What has to fall for the flag to stay down; see the module's text."""
        shifts = [distance(value, self.clean.features[name]) for name, value in seen.features.items()]
        doubts = -seen.confidence.clamp_min(1e-12).log().mean(dim=1)
        return seen.score + _FAINT * (doubts + (torch.stack(shifts).mean(dim=0) if shifts else 0))

    def moved(self, seen: Seen, weights: dict[str, float]) -> Tensor:
        """Weighted sum of the encoders' distances from their clean features; an unnamed one weighs 1."""
        parts = [weights.get(name, 1.0) * distance(value, self.clean.features[name]) for name, value in seen.features.items()]
        return torch.stack(parts).sum(dim=0)

    def aim_at(self, aim: Aim) -> tuple[Value, Judge]:
        """The damage that is wanted, and how it is judged; ranks the clean images by that too."""
        if aim == "margin":
            truth = self.require_labels()
            self.clean.require_fused()
            return lambda seen: margin(seen.require_fused(), truth), self.judge

        def moved(seen: Seen) -> Tensor:
            return distance(seen.embedding, self.clean.embedding)

        def judge(seen: Seen) -> tuple[Tensor, Tensor]:
            return seen.score <= self.target.threshold, moved(seen)

        self.best.success, self.best.merit = judge(self.clean)
        return moved, judge

    def likely_wrong(self, logits: Tensor) -> Tensor:
        """The most likely class but the label's."""
        own = F.one_hot(self.require_labels(), logits.shape[-1]).bool()
        return logits.masked_fill(own, -math.inf).argmax(dim=1)


BMP_WEIGHTS = (1.0, 0.0, 0.5, 2.0)


def ensemble(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    bmp_weights: Sequence[float] = BMP_WEIGHTS,
    patch: bool = False,
) -> Tensor:
    """T1: move the features of all encoders at once, BMP's with each of several weights; no heads needed."""
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    if patch:
        campaign = replace(campaign, box=Box.patch(images))
    for weight in bmp_weights:
        campaign.run(raising(lambda seen, weight=weight: campaign.moved(seen, {BMP: weight})))  # type: ignore[misc]
    return campaign.best.images


def ensemble_universal(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    bmp_weights: Sequence[float] = BMP_WEIGHTS,
    surrogate: Tensor | None = None,
    chunk: int = _CHUNK,
) -> Tensor:
    """T1 with one perturbation for all images, made on `surrogate` [M, 3, H, W], or on the images themselves.

    Gradients are taken of `chunk` images at a time. Kept is the perturbation with most successes on what it was made on, then
    the largest mean merit.
    """
    own = images if surrogate is None else surrogate
    truth = labels if surrogate is None else None
    rows = [slice(start, start + chunk) for start in range(0, len(own), chunk)]
    parts = [
        Campaign.open(
            target,
            own[part],
            None if truth is None else truth[part],
            epsilon=epsilon,
            steps=steps,
            generator=generator,
            restarts=restarts,
        )
        for part in rows
    ]
    shape = (1, *images.shape[1:])
    best, rank = torch.zeros(shape, device=images.device), (-1, -math.inf)
    for weight in bmp_weights:
        for _ in range(restarts):
            delta = (torch.rand(shape, generator=generator).to(images.device) * 2 - 1) * epsilon
            for step in range(steps + 1):
                stored = ((delta * 255).round() / 255).clamp(-epsilon, epsilon)
                gradient, successes, merit = torch.zeros_like(delta), 0, 0.0
                for part, chosen in zip(parts, rows, strict=True):
                    z = (own[chosen] + stored).clamp(0, 1).requires_grad_()
                    with torch.set_grad_enabled(step < steps):
                        seen = target.see(z)
                    success, merits = part.judge(seen.detach())
                    successes, merit = successes + int(success.sum()), merit + float(merits.sum())
                    if step < steps:
                        gradient += gradient_of(part.moved(seen, {BMP: weight}), z).sum(dim=0, keepdim=True)
                if (successes, merit) > rank:
                    best, rank = stored, (successes, merit)
                delta = (delta + step_size(step) * epsilon * gradient.sign()).clamp(-epsilon, epsilon)
    return (images + best).clamp(0, 1)


def bmp_only(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
) -> Tensor:
    """T2: make the BMP branch certain of a wrong class, which takes over a fusion by confidence.

    Aims at the branch's own most likely wrong class by log-odds, then, in a second search, at any wrong class by margin.
    """
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    wrong = campaign.likely_wrong(campaign.clean.require_logits()[:, _BMP])
    truth = campaign.require_labels()
    campaign.run(raising(lambda seen: log_odds(seen.require_logits()[:, _BMP], wrong)))
    campaign.run(raising(lambda seen: margin(seen.require_logits()[:, _BMP], truth)))
    return campaign.best.images


def joint_targeted(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    patch: bool = False,
) -> Tensor:
    """T3: bring all branches to the same wrong class, the fused model's most likely one: they agree and are all confident.

    A branch that is convinced is left, and effort goes to the others. Of the targets to choose this is the first;
    the other choice, five random classes, is not tried.
    """
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    if patch:
        campaign = replace(campaign, box=Box.patch(images))
    wrong = campaign.likely_wrong(campaign.clean.require_fused())
    campaign.run(raising(lambda seen: log_odds(seen.require_logits(), wrong).clamp(max=_SURE).sum(dim=1)))
    return campaign.best.images


def penalised(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    kappa: float = KAPPA,
    aim: Aim = "margin",
    lambdas: Sequence[float] | None = None,
) -> Tensor:
    """T4: the fused logits' margin less lambda times the score's excess over the threshold; best lambda for each image.

    Usually lambda is searched by bisection, image by image. Here each image is attacked with every value of the grid, and its
    best result kept: success need not be monotone in lambda, which bisection takes for granted. With `aim="distance"` this is
    part of T6.
    """
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    damage, judge = campaign.aim_at(aim)

    def value(weight: float) -> Value:
        return lambda seen: damage(seen) - weight * (campaign.quiet(seen) - target.threshold + kappa).relu()

    for weight in lambdas or (LAMBDAS if aim == "margin" else DISTANCE_LAMBDAS):
        campaign.run(raising(value(weight)), judge)
    return campaign.best.images


def two_aims(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    kappa: float = KAPPA,
    aim: Aim = "margin",
    levels: Sequence[float] | None = None,
    project: bool = False,
    patch: bool = False,
) -> Tensor:
    """T5, T6: step on the margin of the fused logits until it is wrong, then on the score until it is under the threshold.

    Selective PGD; with `project`, Orthogonal PGD: each step is orthogonal to the gradient of the aim that it is not for. With
    `aim="distance"` the returned embedding's distance from the clean one takes the margin's place, for a service that has
    no classifier. One search for each level of damage that counts as enough; where both aims are met, the damage goes on.
    """
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    if patch:
        campaign = replace(campaign, box=Box.patch(images))
    damage, judge = campaign.aim_at(aim)

    def unsatisfied(level: float) -> Value:
        def value(seen: Seen) -> Tensor:
            spare = target.threshold - kappa - seen.score
            return (level - damage(seen)).clamp_min(0) + spare.clamp_min(0)

        return value

    for level in levels or (MARGINS if aim == "margin" else DISTANCES):
        campaign.run(switching(damage, campaign.quiet, unsatisfied(level), project=project), judge)
    return campaign.best.images


def false_alarm(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
) -> Tensor:
    """T9: get a harmless image flagged. BMP's confidence falls and the score rises; all else stays where it was.

    Success is a flag without a change of the prediction; the merit is the score.
    """
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)
    clean = campaign.clean
    before = None if clean.fused is None else clean.fused.argmax(dim=1)

    def value(seen: Seen) -> Tensor:
        doubt = -seen.confidence[:, _BMP].clamp_min(1e-12).log()
        # The distance is a gradient where confidence and score are at their flat ends.
        alarm = seen.score + doubt + _FAINT * campaign.moved(seen, {})
        change = sum(
            (distance(seen.features[name], clean.features[name]) for name in MPAE if name in seen.features),
            torch.zeros_like(seen.score),
        )
        if before is not None:
            change = change + (margin(seen.require_fused(), before) + _SURE).relu()
        return alarm - change

    def judge(seen: Seen) -> tuple[Tensor, Tensor]:
        flagged = seen.score > target.threshold
        if before is not None:
            flagged = flagged & (seen.require_fused().argmax(dim=1) == before)
        return flagged, seen.score

    campaign.best.success, campaign.best.merit = judge(clean)
    campaign.run(raising(value), judge)
    return campaign.best.images


def low_confidence(
    target: Target,
    images: Tensor,
    labels: Tensor | None,
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
) -> Tensor:
    """T11: flatten the logits of every branch, so that no confidence stands out and differences of confidence say nothing."""
    campaign = Campaign.open(target, images, labels, epsilon=epsilon, steps=steps, generator=generator, restarts=restarts)

    def value(seen: Seen) -> Tensor:
        logits = seen.require_logits()
        return -(logits.amax(dim=2) - logits.mean(dim=2)).sum(dim=1)

    campaign.clean.require_logits()
    campaign.run(raising(value))
    return campaign.best.images


ADAPTIVE: dict[str, Attack] = {
    "T1": ensemble,
    "T1-universal": ensemble_universal,
    "T2": bmp_only,
    "T3": joint_targeted,
    "T4": penalised,
    "T5-selective": two_aims,
    "T5-orthogonal": partial(two_aims, project=True),
    "T6-penalised": partial(penalised, aim="distance"),
    "T6-selective": partial(two_aims, aim="distance"),
    "T6-orthogonal": partial(two_aims, aim="distance", project=True),
    "T9": false_alarm,
    # A visible patch of 3 % of each image, of any colours; epsilon does not apply.
    "T10-T1": partial(ensemble, patch=True),
    "T10-T3": partial(joint_targeted, patch=True),
    "T10-T5": partial(two_aims, patch=True),
    "T11": low_confidence,
}
