"""Consistency: does each branch agree with itself on a slightly changed image, and with what the robust ones predict?

A DAE is made against the public victim. So the undefended victim stays in the graph as a tripwire: what moves it, and not
the hardened branches, is suspicious. Evidence, each higher = more suspicious:

- shift of the tripwire and of BMP under a blur, of the tripwire under a slight zoom, a move by a few pixels and a mirror too:
  1 - cos between standardised features of the image and of its changed copy;
- residual of BMP: 1 - cos between its features and a ridge regression's prediction from the two MPAE branches (in principal
  components of each); cross residual of each MPAE branch: the same, predicted from the other one;
- whitened residual, and whitened shift under the blur, of the tripwire: the Mahalanobis distance of the same differences from
  those of honest images. A perturbation moves features in directions in which honest ones hardly differ.

All but the tripwire's shifts under blur and zoom read the early stages too, beside the features: what a generator or an
attack on low layers does is seen there first (stage by stage: Lee et al. 2018). Early stages see captions, screenshots and
compression as well, so the detector is fitted on honestly changed images (`model_store.honest`), and what honest changes do
is not news to it.

A busy picture shifts more than a plain one, attacked or not. So some of the tripwire's evidence counts a second time,
beside what is usual for such a picture (normalised conformal prediction: Papadopoulos et al. 2008): its logarithm, less
half of a ridge regression's prediction from the features of the MPAE branches, which a perturbation hardly moves. Half
only: noise, which they do not see either, would look like an attack. Move and mirror count so alone. They betray a
perturbation that is tied to the strides of a network with large steps; in pictures of 32 pixels the others see more.

Each evidence becomes a normal score by its quantiles among the honest images that the detector was fitted on. Normal scores
are added (Stouffer et al. 1949), because a universal perturbation moves all of them a little: the tripwire's as they are,
the tripwire's beside what is usual, those of each branch. Each sum has a conformal p-value among the same images; the
tripwire's is that of the smaller of its two. It is the confidence, and the score is the larger -ln(p / share) of tripwire
and BMP (weighted p-values: Genovese et al. 2006): nine tenths of the false alarms are the tripwire's, because BMP's
evidence speaks against an attack on BMP itself alone. The score's own calibration, on other images, makes the verdict valid
whatever happened here. The cross residuals guard the MPAE branches' votes but do not enter the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.branches import BMP, BRANCHES, EARLY, MPAE, TRIPWIRE, Standard, linear
from hardening.compact import round_weights
from hardening.detectors.base import Detector

BLUR, ZOOM, MOVE, MIRROR = "@blur", "@zoom", "@move", "@mirror"
ALARM = "alarm"
"""Evidence that a network answers itself, of a detector that has one."""
_COMPONENTS = 96
_LEVELS = (0.99, 0.95, 0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01)
"""Tail probabilities at which the tables have their knots; beyond the last a straight line goes on."""
_USUAL_SHARE = 0.5
"""Of what is usual for such a picture, taken off the evidence that counts beside it."""
_TAIL = 0.1
"""Where the tail begins whose slope goes on."""
_FOLDS = KFold(5, shuffle=True, random_state=0)

_SHIFTS = {
    "blur shift": (BLUR, True),
    "zoom shift": (ZOOM, False),
    "move shift": (MOVE, True),
    "mirror shift": (MIRROR, True),
}
"""Their views, and whether early stages are read; not under the tripwire's blur."""
_BESIDE = ("blur shift", "whitened residual", "move shift", "mirror shift")
"""The tripwire's evidence that counts beside what is usual for such a picture."""


class ConsistencyDetector(Detector):
    """See the module's text. `fit` makes one from clean features."""

    name: Literal["consistency", "sentinel", "paper"] = "consistency"
    description = (
        "the undefended victim kept as tripwire; shifts of tripwire and BMP under a blur, of the tripwire under zoom, move "
        "and mirror, their residuals from the MPAE branches' prediction, in features and early stages, as they are and "
        "beside what is usual for such a picture; sum of normal scores and conformal p per branch; "
        "score = larger -ln(p / share)"
    )
    views: tuple[str, ...] = (
        *(name + part for name in (*BRANCHES, TRIPWIRE) for part in ("", EARLY)),
        *(name + part + BLUR for name in (TRIPWIRE, BMP) for part in ("", EARLY)),
        TRIPWIRE + ZOOM,
        *(TRIPWIRE + part + how for part in ("", EARLY) for how in (MOVE, MIRROR)),
    )
    branches: tuple[str, ...] = (*BRANCHES, TRIPWIRE)
    shares: Mapping[str, float] = {TRIPWIRE: 0.9, BMP: 0.1}
    """Of the false alarms, by branch."""
    plain: ClassVar[Mapping[str, tuple[str, ...]]] = {
        TRIPWIRE: ("blur shift", "zoom shift", "whitened blur shift", "whitened residual"),
        BMP: ("blur shift", "residual"),
        MPAE[0]: ("cross residual",),
        MPAE[1]: ("cross residual",),
    }
    """Evidence as it is, by the branch that it speaks against."""

    def __init__(self, spaces: Mapping[str, _Space], maps: Mapping[str, nn.Linear], whiten: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.spaces = nn.ModuleDict(dict(spaces))
        self.maps = nn.ModuleDict(dict(maps))
        self.whiten = nn.ModuleDict(dict(whiten))
        self.usual, self.normal_scores, self.surprises, self.tripwire = (nn.Module() for _ in range(4))
        self.fitted_on = 0

    @classmethod
    def fit(cls, features: Mapping[str, Tensor]) -> Self:
        """Fit on features [N, d] by view of honest images that no encoder was tuned on."""
        spaces = {name: _Space.fit(_stages(features, name)) for name in (*BRANCHES, TRIPWIRE)}
        reduced = {name: space(_stages(features, name)).numpy().astype(np.float64) for name, space in spaces.items()}
        maps, residual = {}, {}
        for name, source in _sources({name: torch.as_tensor(values) for name, values in reduced.items()}).items():
            maps[name], predicted = _ridge(source.numpy(), reduced[name])
            residual[name] = torch.as_tensor(predicted)
        shift = spaces[TRIPWIRE](_stages(features, TRIPWIRE, BLUR)) - spaces[TRIPWIRE](_stages(features, TRIPWIRE))
        differences = {"residual": torch.as_tensor(reduced[TRIPWIRE]) - residual[TRIPWIRE], "blur shift": shift}
        detector = cls(spaces, maps, {kind: _whitening(vectors.numpy()) for kind, vectors in differences.items()})
        lengths = {kind: _out_of_fold_lengths(vectors.numpy()) for kind, vectors in differences.items()}
        logarithms = detector._beside(features, lengths)
        detector.usual, usual = _ridge(detector._picture(features).numpy(), logarithms.numpy().astype(np.float64))
        beside = logarithms - _USUAL_SHARE * torch.as_tensor(usual, dtype=torch.float32)
        evidence = torch.cat([detector._plain(features, residual, lengths), beside], dim=1)
        detector.fitted_on = len(evidence)
        levels = np.array([level for level in _LEVELS if min(level, 1 - level) * len(evidence) >= 2] or [0.5])
        scores = np.array([NormalDist().inv_cdf(1 - level) for level in levels])
        detector.normal_scores = _Table.fit(evidence.numpy(), levels, scores, _slope_of_the_last_quantiles)
        upper = levels[levels <= 0.9] if (levels <= 0.9).any() else levels
        sums = detector._sums(evidence)
        detector.surprises = _Table.fit(sums.numpy(), upper, -np.log(upper), _slope_of_the_mean_excess)
        both = detector._tripwires(detector.surprises(sums))
        detector.tripwire = _Table.fit(both.numpy(), upper, -np.log(upper), _slope_of_the_mean_excess)
        return detector

    @classmethod
    def kinds(cls) -> tuple[tuple[str, str], ...]:
        """Each evidence: the branch that it speaks against, and what it is."""
        plain = [(name, kind) for name, kinds in cls.plain.items() for kind in kinds]
        return (*plain, *((TRIPWIRE, f"{kind}, beside what is usual") for kind in _BESIDE))

    @classmethod
    def _voices(cls) -> tuple[str, ...]:
        """Whom each sum of evidence speaks against; the last one beside what is usual."""
        return (*cls.plain, TRIPWIRE)

    def evidence(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by view -> [N, E], in the order of `kinds`."""
        reduced = {name: self.spaces[name](_stages(features, name)) for name in self.spaces}
        predicted = {name: self.maps[name](source) for name, source in _sources(reduced).items()}
        shift = self.spaces[TRIPWIRE](_stages(features, TRIPWIRE, BLUR)) - reduced[TRIPWIRE]
        differences = {"residual": reduced[TRIPWIRE] - predicted[TRIPWIRE], "blur shift": shift}
        lengths = {kind: _length(self.whiten[kind](vectors)) for kind, vectors in differences.items()}
        usual = self.usual(self._picture(features))
        beside = self._beside(features, lengths) - _USUAL_SHARE * usual
        return torch.cat([self._plain(features, predicted, lengths), beside], dim=1)

    def _plain(
        self, features: Mapping[str, Tensor], predicted: Mapping[str, Tensor], lengths: Mapping[str, Tensor]
    ) -> Tensor:
        """[N, P]: the evidence of `plain`."""
        columns = []
        for name, kinds in self.plain.items():
            for kind in kinds:
                if kind == ALARM:
                    columns.append(features[name][:, 0])
                elif kind in _SHIFTS:
                    columns.append(self._shift(features, name, kind))
                elif kind.startswith("whitened "):
                    columns.append(lengths[kind.removeprefix("whitened ")].to(features[name].dtype))
                else:
                    found = self.spaces[name](_stages(features, name))
                    columns.append(_distance(predicted[name].to(found.dtype), found))
        return torch.stack(columns, dim=1)

    def _beside(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
        """[N, 4]: logarithms of the evidence of `_BESIDE`, before what is usual is taken off."""
        columns = [
            self._shift(features, TRIPWIRE, kind) if kind in _SHIFTS else lengths[kind.removeprefix("whitened ")]
            for kind in _BESIDE
        ]
        return torch.stack([column.to(features[TRIPWIRE].dtype) for column in columns], dim=1).clamp_min(1e-6).log()

    def _shift(self, features: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
        space = self.spaces[name]
        assert isinstance(space, _Space)
        view, early = _SHIFTS[kind]
        early = early and (name, view) != (TRIPWIRE, BLUR)
        before, after = (_stages(features, name, how, early=early) for how in ("", view))
        return _distance(space.standardise(before), space.standardise(after))

    def _picture(self, features: Mapping[str, Tensor]) -> Tensor:
        """[N, d]: the picture as the MPAE branches see it, standardised; no early stages: these see a perturbation."""
        sides = []
        for name in MPAE:
            space = self.spaces[name]
            assert isinstance(space, _Space)
            sides.append(space.standardise(features[name]))
        return torch.cat(sides, dim=1)

    def _sums(self, evidence: Tensor) -> Tensor:
        """[N, E] -> [N, V]: the normal scores of each of `_voices`, added."""
        scores = self.normal_scores(evidence)
        sums, start = [], 0
        for count in (*map(len, self.plain.values()), len(_BESIDE)):
            sums.append(scores[:, list(range(start, start + count))].sum(dim=1))
            start += count
        return torch.stack(sums, dim=1)

    def _tripwires(self, surprises: Tensor) -> Tensor:
        """[N, V] -> [N, 1]: the louder of the tripwire's voices."""
        own = [number for number, name in enumerate(self._voices()) if name == TRIPWIRE]
        return surprises[:, own].amax(dim=1, keepdim=True)

    def minus_log_p(self, evidence: Tensor) -> Tensor:
        """[N, E] -> [N, B]: -ln of each branch's conformal p-value, in the order of `branches`; without a ceiling."""
        surprises: Tensor = self.surprises(self._sums(evidence))
        tripwire = self.tripwire(self._tripwires(surprises))
        columns = [tripwire[:, 0] if name == TRIPWIRE else surprises[:, self._voices().index(name)] for name in self.branches]
        return torch.stack(columns, dim=1)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Detector."""
        surprise = self.minus_log_p(self.evidence(features))
        scored = [surprise[:, self.branches.index(name)] + math.log(share) for name, share in self.shares.items()]
        return torch.exp(-surprise), torch.stack(scored, dim=1).amax(dim=1)

    def parameters_for_people(self) -> dict[str, Any]:
        """What was measured, on how many honest images."""
        return {
            "evidence": [f"{name}: {kind}" for name, kind in self.kinds()],
            "scored": dict(self.shares),
            "fitted_on": self.fitted_on,
        }


def _stages(features: Mapping[str, Tensor], name: str, how: str = "", early: bool = True) -> Tensor:
    """An encoder's features [N, d] of one view, and behind them those of its early stages, where it has any."""
    parts = [name + part + how for part in ("", EARLY)[: 1 + early]]
    return torch.cat([features[part] for part in parts if part in features], dim=1)


def _sources(reduced: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each encoder's features are predicted from."""
    robust = torch.cat([reduced[name] for name in MPAE], dim=1)
    return {TRIPWIRE: robust, BMP: robust, MPAE[0]: reduced[MPAE[1]], MPAE[1]: reduced[MPAE[0]]}


class _Space(nn.Module):
    """Standardised features and their leading principal components."""

    mean: Tensor
    scale: Tensor

    def __init__(self, standard: Standard, basis: NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("mean", standard.mean)
        self.register_buffer("scale", standard.scale)
        self.basis = linear(basis, np.zeros(len(basis)))

    @classmethod
    def fit(cls, features: Tensor) -> _Space:
        standard = Standard.of(features)
        count = max(2, min(_COMPONENTS, features.shape[1], len(features) // 4))
        pca = PCA(count, svd_solver="full").fit(standard(features).numpy())
        space = cls(standard, pca.components_)
        round_weights(space)  # before anything is fitted behind it
        return space

    def standardise(self, features: Tensor) -> Tensor:
        """Features [N, d], or their first columns alone."""
        d = features.shape[1]
        if d == len(self.mean):  # without a slice, `Graph` finds the mean by its name
            return (features - self.mean) / self.scale
        return (features - self.mean[:d]) / self.scale[:d]

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        return super().__call__(features)  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        reduced: Tensor = self.basis(self.standardise(features))
        return reduced


def _ridge(source: NDArray[np.floating[Any]], target: NDArray[np.float64]) -> tuple[nn.Linear, NDArray[np.float64]]:
    """A ridge regression of [N, k] on [N, d], and its predictions [N, k] out of fold: on the images that it was fitted on,
    what it leaves would look too small."""
    model = RidgeCV(alphas=np.logspace(-1, 5, 13)).fit(source, target)
    held_out = cross_val_predict(Ridge(alpha=float(model.alpha_)), source, target, cv=_FOLDS)
    return linear(model.coef_, model.intercept_), held_out


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(dim=1)


def _length(vectors: Tensor) -> Tensor:
    """[N, d] -> [N]; the gradient at 0 is 0 and not undefined."""
    return (vectors.square().sum(dim=1) + 1e-12).sqrt()


def _whitening(vectors: NDArray[np.floating[Any]]) -> nn.Linear:
    """The map after which differences [N, d] of clean images have length 1 in every direction; shrunk (Ledoit, Wolf 2004)."""
    fitted = LedoitWolf().fit(vectors)
    # The precision is L L^T, and x^T L L^T x is the squared length of L^T x. A jitter: features that never differ.
    precision = np.linalg.inv(fitted.covariance_ + 1e-9 * np.eye(vectors.shape[1]))
    root = np.asarray(np.linalg.cholesky((precision + precision.T) / 2).T, np.float64)
    return linear(root, -root @ fitted.location_)


def _out_of_fold_lengths(vectors: NDArray[np.floating[Any]]) -> Tensor:
    """Lengths [N] after a whitening that was fitted on the others: those of its own images would look too small."""
    lengths = torch.zeros(len(vectors))
    for rest, held in _FOLDS.split(vectors):
        lengths[held] = _length(_whitening(vectors[rest])(torch.as_tensor(vectors[held], dtype=torch.float32)))
    return lengths


class _Table(nn.Module):
    """An increasing, piecewise linear function for each column: constant below, and a straight line above.

    A sum of clipped ramps, so that a graph needs no search.
    """

    floor: Tensor
    knots: Tensor
    widths: Tensor
    slopes: Tensor

    def __init__(self, floor: float, columns: Sequence[tuple[NDArray[np.float64], ...]]) -> None:
        super().__init__()
        self.register_buffer("floor", torch.tensor(floor))
        for name, values in zip(("knots", "widths", "slopes"), zip(*columns, strict=True), strict=True):
            self.register_buffer(name, torch.tensor(np.stack(values), dtype=torch.float32))

    @classmethod
    def fit(
        cls,
        clean: NDArray[np.floating[Any]],
        levels: NDArray[np.float64],
        values: NDArray[np.float64],
        tail: Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], float],
    ) -> _Table:
        """Clean values [N, K]: the quantile that a share `levels` of them exceeds is mapped to `values`."""
        columns = []
        for column in np.asarray(clean, dtype=np.float64).T:
            knots = np.quantile(column, 1 - levels)
            knots = np.maximum.accumulate(knots + 1e-7 * np.arange(len(knots)))
            widths, rises = np.diff(knots), np.diff(values)
            last = tail(column, levels, values, knots)
            columns.append((knots, np.append(widths, 1e9), np.append(rises / np.maximum(widths, 1e-7), last)))
        return cls(float(values[0]), columns)

    def forward(self, values: Tensor) -> Tensor:
        """[N, K] -> [N, K]."""
        above = (values[:, :, None] - self.knots).clamp_min(0).minimum(self.widths)
        return (above * self.slopes).sum(dim=2) + self.floor


def _slope_of_the_last_quantiles(
    _: NDArray[np.float64], levels: NDArray[np.float64], values: NDArray[np.float64], knots: NDArray[np.float64]
) -> float:
    first = int(np.argmax(levels <= max(_TAIL, levels[-1])))
    first = min(first, len(knots) - 2) if len(knots) > 1 else 0
    rise, run = values[-1] - values[first], knots[-1] - knots[first]
    return float(rise / max(run, 1e-6)) if rise > 0 else 1.0


def _slope_of_the_mean_excess(
    clean: NDArray[np.float64], levels: NDArray[np.float64], values: NDArray[np.float64], knots: NDArray[np.float64]
) -> float:
    """An exponential tail: peaks over threshold with shape 0."""
    threshold = np.quantile(clean, 1 - _TAIL)
    return 1 / max(float(np.mean(clean[clean >= threshold] - threshold)), 1e-6)
