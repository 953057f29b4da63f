"""The two gates: MPAE (victim and auxiliary, adversarially tuned) and BMP (local data only), and their fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.heads import GUARD_FLOOR, GUARD_LEAST, RFDM_K, VOTE_FLOOR

MPAE = ("mpae_victim", "mpae_auxiliary")
BMP = "bmp"
BRANCHES = (*MPAE, BMP)
TRIPWIRE = "tripwire"
SENTINEL = "sentinel"
"""The network that was trained to see perturbations, where the detector has one. See `hardening.sentinel`."""
EARLY, LAYOUT = ".early", ".layout"
"""Behind an encoder's name: parts of what is read from it beside its features. See `encoders.Encoder.readout`."""
PARTS = {"": 1.0, EARLY: 0.3, LAYOUT: 0.5}
"""What is read from a branch, and its weight in the embedding."""


@dataclass(frozen=True)
class Standard:
    """Mean and scale [d] of an encoder's features on clean images, so that encoders can be compared."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standard:
        """From features [N, d]; a channel that hardly moves is not blown up."""
        scale = features.std(dim=0)
        return cls(features.mean(dim=0), scale.clamp_min(0.1 * scale.mean()).clamp_min(1e-6))

    def __call__(self, features: Tensor) -> Tensor:
        """[N, d] -> [N, d]."""
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Head:
    """A linear classifier on an encoder's features: logits [N, C] = standard(features) @ weight.T + bias."""

    standard: Standard
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[N, d] -> logits [N, C]."""
        return self.standard(features) @ self.weight.T + self.bias


def train_head(features: Tensor, labels: NDArray[np.int64]) -> Head:
    """Fit a head on frozen features [N, d] of clean images with labels [N] in 0..C-1.

    Multinomial logistic regression with the penalty chosen by cross-validation, instead of the paper's three-layer
    network: convex, repeatable, and small enough for a bundle.
    """
    standard = Standard.of(features)
    model = LogisticRegressionCV(
        Cs=[1e-3, 1e-2, 1e-1, 1.0],
        cv=3,
        scoring="neg_log_loss",
        max_iter=300,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    model.fit(standard(features).numpy(), labels)
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one row of weights for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Head(standard, torch.as_tensor(weight, dtype=torch.float32), torch.as_tensor(bias, dtype=torch.float32))


def linear(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> nn.Linear:
    """A fixed layer: [N, d] -> [N, k] by weight [k, d] and bias [k]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32), requires_grad=False)
    layer.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32), requires_grad=False)
    return layer


def rfdm_weights(logits: Tensor, k: float = RFDM_K) -> Tensor:
    """Robust federal decision (ZePAD section 3; its code, utils/confidence.py): logits [N, B, C] -> weights [N, B].

    c = m exp(k (m - 1/2)) with m the largest softmax probability of each branch; scaled to sum to 1.
    """
    m = logits.softmax(dim=-1).amax(dim=-1)
    c = m * torch.exp(k * (m - 0.5))
    return c / c.sum(dim=1, keepdim=True)


def fuse(logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of raw logits [N, B, C] by [N, B] -> [N, C]."""
    return (weights[..., None] * logits).sum(dim=1)


def guarded_vote(logits: Tensor, confidence: Tensor) -> Tensor:
    """The fusion that is served: logits [N, B, C], each branch's p-value [N, B] -> log-odds [N, C] that add up the votes.

    A branch votes with log(probability + VOTE_FLOOR / C), so that what it says against a class has a bound: where votes are
    logits weighted by certainty (ZePAD's RFDM), whoever breaks one branch thoroughly overrules the others. And it loses up
    to half of its vote as its own evidence speaks against it: below GUARD_FLOOR it is multiplied by p / GUARD_FLOOR, but by
    no less than GUARD_LEAST.
    """
    trust = (confidence / GUARD_FLOOR).clamp(GUARD_LEAST, 1)
    votes = (logits.softmax(dim=-1) + VOTE_FLOOR / logits.shape[-1]).log()
    return (trust[..., None] * votes).sum(dim=1)


def embed(branches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The returned embedding [N, D]: for each branch its centred parts, each at unit length times its weight, side by side.

    `branches` are centred values [N, d] by part. Each branch has unit length, and the whole is scaled to it. The weights are
    fixed, not per image: stored vectors must stay comparable, and an attacker must not steer the metric. Features after a
    ReLU all point into nearly the same direction, so each part's mean on clean images has been taken off.
    """
    sides = []
    for parts in branches:
        length = math.sqrt(sum(PARTS[part] ** 2 for part in parts))
        sides += [F.normalize(value, dim=1) * (PARTS[part] / length) for part, value in parts.items()]
    return torch.cat(sides, dim=1) / math.sqrt(len(branches))
