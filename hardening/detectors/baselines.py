"""Detectors of other people, for comparison: evaluated, never exported.

Each has `fit`, on clean images only, and `score`, [N], higher = more suspicious. Those that need nothing but features take
the mapping that `hardening.calibrate.collect` returns; those that need more forwards take uint8 images [N, H, W, 3] and get
functions of such images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE, Head, rfdm_weights
from hardening.encoders import as_input
from hardening.heads import RFDM_K

Scores = NDArray[np.float64]
Images = NDArray[np.uint8]
OfImages = Callable[[Images], Tensor]
"""uint8 [N, H, W, 3] -> [N, d] on the CPU: features, or logits."""
READINGS = ("S1", "S2", "S3", "S4", "S5", "S5 soft")
_CHUNK = 64


class PaperReading:
    """ZePAD's rule (section 3) in the readings that its text leaves open; m is a branch's largest softmax probability.

    S1: mean m of the MPAE branches - m of BMP. S2: the largest instead of the mean. S3: log mean c - log c of BMP, with the
    fusion's c = m exp(k (m - 1/2)). S4: the same difference of the fusion's weights. S5: 1 where the MPAE branches agree on a
    class and BMP says another. S5 soft: Jensen-Shannon divergence between BMP and the mean of MPAE.
    """

    def __init__(self, reading: Literal["S1", "S2", "S3", "S4", "S5", "S5 soft"]) -> None:
        self.name, self.reading = f"paper {reading}", reading

    def fit(self, features: Mapping[str, Tensor], heads: Mapping[str, Head]) -> Self:
        """Nothing is learnt but the heads, which others fitted."""
        self.heads = heads
        return self

    def score(self, features: Mapping[str, Tensor]) -> Scores:
        """Features [N, d] by view -> [N]."""
        logits = _logits(self.heads, features)
        robust, other = [BRANCHES.index(name) for name in MPAE], BRANCHES.index(BMP)
        m = logits.softmax(dim=2).amax(dim=2)
        match self.reading:
            case "S1":
                found = m[:, robust].mean(dim=1) - m[:, other]
            case "S2":
                found = m[:, robust].amax(dim=1) - m[:, other]
            case "S3":
                c = m * torch.exp(RFDM_K * (m - 0.5))
                found = c[:, robust].mean(dim=1).log() - c[:, other].log()
            case "S4":
                weights = rfdm_weights(logits)
                found = weights[:, robust].mean(dim=1) - weights[:, other]
            case "S5":
                classes = logits.argmax(dim=2)
                agree = classes[:, robust[0]] == classes[:, robust[1]]
                found = (agree & (classes[:, robust[0]] != classes[:, other])).double()
            case _:
                p = logits.softmax(dim=2)
                found = _jensen_shannon(torch.stack([p[:, robust].mean(dim=1), p[:, other]], dim=1))
        return _scores(found)


class BranchDivergence:
    """Jensen-Shannon divergence of the three branches' softmax, in nats."""

    name = "JSD of the branches"

    def fit(self, features: Mapping[str, Tensor], heads: Mapping[str, Head]) -> Self:
        """Nothing is learnt but the heads, which others fitted."""
        self.heads = heads
        return self

    def score(self, features: Mapping[str, Tensor]) -> Scores:
        """Features [N, d] by view -> [N]."""
        return _scores(_jensen_shannon(_logits(self.heads, features).softmax(dim=2)))


class Mahalanobis:
    """Squared Mahalanobis distance from the nearest class's mean, one covariance for all (Lee et al. 2018).

    Without labels there is one class. The covariance is shrunk (Ledoit and Wolf 2004), as features outnumber what few clean
    images can tell.
    """

    name = "Mahalanobis"

    def __init__(self, view: str = TRIPWIRE) -> None:
        self.view = view

    def fit(self, features: Mapping[str, Tensor], labels: NDArray[np.int64] | None = None) -> Self:
        """Means and covariance of clean features [N, d]."""
        x = _array(features[self.view])
        classes = np.zeros(len(x), np.int64) if labels is None else labels
        present, index = np.unique(classes, return_inverse=True)
        self.means = np.stack([x[classes == label].mean(axis=0) for label in present])
        covariance, self.shrinkage = ledoit_wolf(x - self.means[index], assume_centered=True)
        self.precision = np.linalg.pinv(covariance)
        return self

    def score(self, features: Mapping[str, Tensor]) -> Scores:
        """Features [N, d] by view -> [N]."""
        x = _array(features[self.view])
        by_class = [np.einsum("nd,de,ne->n", x - mean, self.precision, x - mean, optimize=True) for mean in self.means]
        return np.asarray(np.min(by_class, axis=0), dtype=np.float64)


class Neighbours:
    """Distance to the k-th nearest clean image, between centred features of unit length (Sun et al. 2022)."""

    name = "kNN distance"

    def __init__(self, view: str = TRIPWIRE, k: int = 20) -> None:
        self.view, self.k = view, k

    def fit(self, features: Mapping[str, Tensor]) -> Self:
        """Remember the clean features [N, d]."""
        self.centre = features[self.view].mean(dim=0)
        self.gallery = F.normalize(features[self.view] - self.centre, dim=1)
        return self

    def score(self, features: Mapping[str, Tensor]) -> Scores:
        """Features [N, d] by view -> [N]."""
        x = F.normalize(features[self.view] - self.centre, dim=1)
        k = min(self.k, len(self.gallery))
        return _scores(
            torch.cat([torch.cdist(part, self.gallery).kthvalue(k, dim=1).values for part in torch.split(x, _CHUNK)])
        )


class Squeezing:
    """Feature squeezing (Xu et al. 2018): how far the softmax moves, in L1, when colours or details are taken out.

    The larger of two squeezers: 5 bits a channel, and a 2 x 2 median filter. Three forwards an image.
    """

    name = "feature squeezing"

    def __init__(self, logits: OfImages) -> None:
        self.logits = logits

    def fit(self, images: Images) -> Self:
        """Nothing is learnt."""
        return self

    def score(self, images: Images) -> Scores:
        """uint8 images [N, H, W, 3] -> [N]."""
        plain = self.logits(images).softmax(dim=1)
        moved = [
            (self.logits(squeezed).softmax(dim=1) - plain).abs().sum(dim=1)
            for squeezed in (fewer_bits(images), median_filter(images))
        ]
        return _scores(torch.stack(moved).amax(dim=0))


def fewer_bits(images: Images, bits: int = 5) -> Images:
    """Round each value to `bits` bits, spread over 0..255 again."""
    levels = 2**bits - 1
    return np.asarray(np.rint(np.rint(images / 255 * levels) / levels * 255), dtype=np.uint8)


def median_filter(images: Images) -> Images:
    """2 x 2 median of each pixel with those above and left of it, edges reflected; of four values the third smallest."""
    padded = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), mode="symmetric")
    corners = [padded[:, 1:, 1:], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, :-1, :-1]]
    return np.asarray(np.sort(np.stack(corners), axis=0)[2], dtype=np.uint8)


class Beyond:
    """BEYOND (He et al. 2024): does an image agree with its augmented neighbours, in label and in representation?

    Two figures of each image: the share of its neighbours with its own label, and the k-th largest cosine between its
    features and theirs. The paper flags an image when either is below what clean images show; here each becomes -log of its
    rank among clean images, and the score is the larger. One forward for the image and one for each neighbour: 51.
    """

    name = "BEYOND"

    def __init__(
        self,
        features: OfImages,
        head: Callable[[Tensor], Tensor],
        *,
        neighbours: int = 50,
        k: int = 20,
        seed: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.features, self.head, self.neighbours, self.k, self.seed, self.augment = (
            features,
            head,
            neighbours,
            k,
            seed,
            augment,
        )

    def fit(self, images: Images) -> Self:
        """Rank clean images [N, H, W, 3]."""
        self.clean = [np.sort(figure) for figure in self.figures(images)]
        return self

    def score(self, images: Images) -> Scores:
        """uint8 images [N, H, W, 3] -> [N]."""
        ranked = []
        for figure, clean in zip(self.figures(images), self.clean, strict=True):
            p = (1 + np.searchsorted(clean, figure, side="right")) / (len(clean) + 1)
            ranked.append(-np.log(np.minimum(p, 1)))
        return np.asarray(np.max(ranked, axis=0), dtype=np.float64)

    def figures(self, images: Images) -> tuple[Scores, Scores]:
        """uint8 images [N, H, W, 3] -> (label consistency [N], representation similarity [N]); high for clean images.

        The same augmentations are drawn for every batch, so an image's figures do not depend on its neighbours there.
        """
        augment = self.augment or _augmentation(*images.shape[1:3])
        found = []
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            own = self.features(chunk)
            label = self.head(own).argmax(dim=1)
            same, similar = [], []
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                pictures = as_input(chunk)
                for _ in range(self.neighbours):
                    changed = augment(pictures)
                    pixels = (changed * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
                    other = self.features(pixels)
                    same.append((self.head(other).argmax(dim=1) == label).double())
                    similar.append(F.cosine_similarity(own, other, dim=1))
            nearest = torch.stack(similar).topk(min(self.k, self.neighbours), dim=0).values[-1]
            found.append((_scores(torch.stack(same).mean(dim=0)), _scores(nearest)))
        consistency, similarity = (np.concatenate(figure) for figure in zip(*found, strict=True))
        return consistency, similarity


def _augmentation(height: int, width: int) -> Callable[[Tensor], Tensor]:
    """What SimSiam was trained with on small pictures, and BEYOND draws its neighbours by."""
    chain: Callable[[Tensor], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop((height, width), scale=(0.2, 1.0), antialias=True),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomHorizontalFlip(),
        ]
    )
    return chain


def _logits(heads: Mapping[str, Head], features: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([heads[name](features[name]) for name in BRANCHES], dim=1)


def _jensen_shannon(p: Tensor) -> Tensor:
    """[N, B, C] -> [N]: entropy of the mean less mean entropy."""
    return _entropy(p.mean(dim=1)) - _entropy(p).mean(dim=1)


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum(dim=-1)
    return entropy


def _scores(values: Tensor) -> Scores:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)


def _array(values: Tensor) -> NDArray[np.float64]:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)
