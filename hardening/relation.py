"""Regularisers that keep the relations between images while an encoder is tuned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-7


def feature_relation(adversarial: Tensor, benign: Tensor) -> Tensor:
    """ZePAD's relation alignment on encoder features (section 3, Eqs. 5-7), a scalar.

    `adversarial` and `benign` are features [N, d] of the same N images; `benign` is the target and carries no gradient.
    Each image's distances to the others, less the distance to the nearest (so that crowded regions do not dominate), are
    scaled to sum to 1; the loss is the binary cross-entropy gap between the two tables. The paper's brackets differ
    between numerator and denominator; here the nearest neighbour's term is subtracted alike in both, from 1 - cos where the
    paper has 2 - cos, so that the nearest has no share and the farthest the largest. A mean over rows
    instead of the published sum over all pairs: the sum grows with the square of the batch, the mean does not grow.
    """
    return _binary_kl(_shares(benign.detach()), _shares(adversarial))


def genaf_relation(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor) -> Tensor:
    """Gen-AF's genetic regularisation on logits [N, C] (Gen-AF section 4; utils/gr.py of its code), a scalar.

    Hard pairs are drawn together where `labels` [N] agree and apart where they differ; the adversarial table follows the
    clean one. The published call has the two exchanged and lets both move; here the clean side is the fixed target.
    """
    loss = F.cross_entropy(clean_logits, labels, reduction="none").detach()
    weight = torch.tanh((loss[:, None] + loss[None, :]) / 32)
    prior = 2 * weight * torch.where(labels[:, None] == labels[None, :], -1.0, 1.0)
    target = (1 - weight) * _distances(clean_logits.detach()) + prior
    return _binary_kl(_similarity_shares(target), _similarity_shares(_distances(adversarial_logits)))


def _distances(vectors: Tensor) -> Tensor:
    """Cosine distances [N, N] less each row's nearest; the diagonal is 0."""
    unit = F.normalize(vectors, dim=1, eps=_TINY)
    distance = 1 - unit @ unit.T
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    nearest = distance.masked_fill(itself, torch.inf).min(dim=1, keepdim=True).values
    return (distance - nearest).masked_fill(itself, 0.0)


def _shares(features: Tensor) -> Tensor:
    distance = _distances(features).clamp_min(0)
    return distance / distance.sum(dim=1, keepdim=True).clamp_min(_TINY)


def _similarity_shares(distance: Tensor) -> Tensor:
    similarity = 1 - distance.clamp(_TINY, 2 - _TINY) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def _binary_kl(target: Tensor, found: Tensor) -> Tensor:
    p, q = target.clamp(_TINY, 1 - _TINY), found.clamp(_TINY, 1 - _TINY)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(dim=1).mean()
