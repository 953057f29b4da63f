"""The paper's rule, literally: mean softmax confidence of the MPAE branch less that of the BMP branch (ZePAD, section 3).

Statistic S1 of the readings that the paper leaves open, with uncalibrated softmax; the paper flags at 0.1. Kept for
comparison: see the card for what it detects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hardening.branches import BMP, BRANCHES, MPAE, Head
from hardening.detectors.base import Detector

PAPER_THRESHOLD = 0.1


class PaperDetector(Detector):
    """Confidence is the largest softmax probability of each branch's head."""

    name = "paper"
    description = "mean softmax confidence of the MPAE heads minus that of the BMP head (ZePAD's rule)"
    views = BRANCHES
    branches = BRANCHES

    def __init__(self, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name in BRANCHES:
            head = heads[name]
            # The head's standardisation folds into its weights.
            weight = head.weight / head.standard.scale
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(head.bias - weight @ head.standard.mean)
            self.heads[name] = layer

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See Detector."""
        by_name = {name: head(features[name]).softmax(dim=1).amax(dim=1) for name, head in self.heads.items()}
        score = torch.stack([by_name[name] for name in MPAE]).mean(dim=0) - by_name[BMP]
        return torch.stack([by_name[name] for name in BRANCHES], dim=1), score

    def parameters_for_people(self) -> dict[str, Any]:
        """The paper's own threshold; the verdict uses the calibration table instead."""
        return {"paper_threshold": PAPER_THRESHOLD}
