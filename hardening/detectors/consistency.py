"""Consistency: does each branch agree with itself on a slightly blurred image, and with what the robust ones predict?

A DAE is made against the public victim. So the undefended victim stays in the graph as a tripwire: what moves it, and not
the hardened branches, is suspicious. Evidence, each higher = more suspicious:

- blur shift of the tripwire and of BMP: 1 - cos between standardised features of the image and of its blurred copy;
- residual of the tripwire and of BMP: 1 - cos between their features and a ridge regression's prediction from the two MPAE
  branches (in principal components of each);
- cross residual of each MPAE branch: the same, predicted from the other one.

Each evidence becomes -log p, p its conformal p-value among clean images the detector was fitted on; a branch's confidence
is the Bonferroni-corrected p of its own evidence; the score is the largest -log p among tripwire and BMP. The score's own
calibration, on other images, makes the verdict valid whatever happened here. The cross residuals guard the MPAE branches'
votes but do not enter the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE, Standard
from hardening.detectors.base import Detector

BLUR = "@blur"
_COMPONENTS = 96
_LEVELS = (0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01)
"""Tail probabilities at which the table of -log p has its knots; beyond the last, an exponential tail goes on."""

_EVIDENCE = (
    (TRIPWIRE, "blur shift"),
    (TRIPWIRE, "residual"),
    (BMP, "blur shift"),
    (BMP, "residual"),
    (MPAE[0], "cross residual"),
    (MPAE[1], "cross residual"),
)
_SCORED = 4


class ConsistencyDetector(Detector):
    """See the module's text. `fit` makes one from clean features."""

    name = "consistency"
    description = (
        "the undefended victim kept as tripwire; blur shift of tripwire and BMP, and their residual from the MPAE branches' "
        "prediction; conformal p per branch; score = largest -ln p"
    )
    views = (*BRANCHES, TRIPWIRE, TRIPWIRE + BLUR, BMP + BLUR)
    branches = (*BRANCHES, TRIPWIRE)

    knots: Tensor
    widths: Tensor
    slopes: Tensor

    def __init__(
        self,
        spaces: Mapping[str, _Space],
        maps: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
        evidence: NDArray[np.float64],
    ) -> None:
        super().__init__()
        self.spaces = nn.ModuleDict(dict(spaces))
        self.maps = nn.ModuleDict({name: _linear(weight, bias) for name, (weight, bias) in maps.items()})
        self.clean_images = len(evidence)
        tables = [_table(evidence[:, column]) for column in range(evidence.shape[1])]
        for buffer, values in zip(("knots", "widths", "slopes"), zip(*tables, strict=True), strict=True):
            self.register_buffer(buffer, torch.tensor(np.stack(values), dtype=torch.float32))

    @classmethod
    def fit(cls, features: Mapping[str, Tensor]) -> ConsistencyDetector:
        """Fit on features [N, d] by view of clean images that no encoder was tuned on."""
        spaces = {name: _Space.fit(features[name]) for name in (*BRANCHES, TRIPWIRE)}
        reduced = {name: space(features[name]).numpy().astype(np.float64) for name, space in spaces.items()}
        robust = np.concatenate([reduced[name] for name in MPAE], axis=1)
        pairs = {TRIPWIRE: robust, BMP: robust, MPAE[0]: reduced[MPAE[1]], MPAE[1]: reduced[MPAE[0]]}
        maps, residual = {}, {}
        folds = KFold(5, shuffle=True, random_state=0)
        for name, source in pairs.items():
            model = RidgeCV(alphas=np.logspace(-1, 5, 13)).fit(source, reduced[name])
            maps[name] = (model.coef_, model.intercept_)
            # Out of fold: residuals of images that the map was fitted on would look too small.
            predicted = cross_val_predict(Ridge(alpha=float(model.alpha_)), source, reduced[name], cv=folds)
            residual[name] = _distance(torch.as_tensor(predicted), torch.as_tensor(reduced[name])).numpy()
        blur = {
            name: _distance(spaces[name].standardise(features[name]), spaces[name].standardise(features[name + BLUR])).numpy()
            for name in (TRIPWIRE, BMP)
        }
        columns = [blur[name] if kind == "blur shift" else residual[name] for name, kind in _EVIDENCE]
        return cls(spaces, maps, np.stack(columns, axis=1))

    def evidence(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by view -> [N, 6], in the order of the module's text."""
        reduced = {name: space(features[name]) for name, space in self.spaces.items()}
        robust = torch.cat([reduced[name] for name in MPAE], dim=1)
        source = {TRIPWIRE: robust, BMP: robust, MPAE[0]: reduced[MPAE[1]], MPAE[1]: reduced[MPAE[0]]}
        columns = []
        for name, kind in _EVIDENCE:
            if kind == "blur shift":
                space = self.spaces[name]
                assert isinstance(space, _Space)
                columns.append(_distance(space.standardise(features[name]), space.standardise(features[name + BLUR])))
            else:
                columns.append(_distance(self.maps[name](source[name]), reduced[name]))
        return torch.stack(columns, dim=1)

    def minus_log_p(self, evidence: Tensor) -> Tensor:
        """[N, 6] -> [N, 6]: a piecewise linear, increasing function for each evidence, without a ceiling."""
        above = (evidence[:, :, None] - self.knots).clamp_min(0).minimum(self.widths)
        return (above * self.slopes).sum(dim=2)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Detector."""
        surprise = self.minus_log_p(self.evidence(features))
        confidence = []
        for branch in self.branches:
            own = [column for column, (name, _) in enumerate(_EVIDENCE) if name == branch]
            worst = surprise[:, own].amax(dim=1)
            confidence.append((len(own) * torch.exp(-worst)).clamp(max=1.0))
        return torch.stack(confidence, dim=1), surprise[:, :_SCORED].amax(dim=1)

    def parameters_for_people(self) -> dict[str, Any]:
        """What was measured on how many clean images."""
        return {
            "evidence": [f"{name}: {kind}" for name, kind in _EVIDENCE],
            "scored": _SCORED,
            "fitted_on": self.clean_images,
        }


class _Space(nn.Module):
    """Standardised features and their leading principal components."""

    mean: Tensor
    scale: Tensor

    def __init__(self, standard: Standard, basis: NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("mean", standard.mean)
        self.register_buffer("scale", standard.scale)
        self.basis = _linear(basis, np.zeros(len(basis)))

    @classmethod
    def fit(cls, features: Tensor) -> _Space:
        standard = Standard.of(features)
        count = max(2, min(_COMPONENTS, features.shape[1], len(features) // 4))
        pca = PCA(count, svd_solver="full").fit(standard(features).numpy())
        return cls(standard, pca.components_)

    def standardise(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        return super().__call__(features)  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        reduced: Tensor = self.basis(self.standardise(features))
        return reduced


def _linear(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32), requires_grad=False)
    layer.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32), requires_grad=False)
    return layer


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(dim=1)


def _table(clean: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Knots, widths and slopes of -log p as a sum of clipped ramps.

    Levels finer than the sample can show are left out of the table's end by repeating the last knot with no width.
    """
    levels = np.array([level for level in _LEVELS if level * len(clean) >= 2] or _LEVELS[:1])
    knots = np.concatenate([[clean.min()], np.quantile(clean, 1 - levels)])
    values = np.concatenate([[0.0], -np.log(levels)])
    knots = np.maximum.accumulate(knots + 1e-7 * np.arange(len(knots)))
    widths = np.diff(knots)
    slopes = np.diff(values) / np.maximum(widths, 1e-7)
    # Exponential tail: the mean excess over the last quarter of the table (peaks over threshold with shape 0).
    threshold = np.quantile(clean, 0.9)
    excess = max(float(np.mean(clean[clean >= threshold] - threshold)), 1e-6)
    padding = len(_LEVELS) - len(levels)
    return (
        np.concatenate([knots, np.repeat(knots[-1], padding)]),
        np.concatenate([widths, [np.float32(1e9)], np.zeros(padding)]),
        np.concatenate([slopes, [1 / excess], np.zeros(padding)]),
    )
