"""An encoder that could not become a bundle is refused before it is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hardening import architectures, graph, preflight
from hardening.preflight import check_encoders
from hardening.recipe import Recipe, RecipeError
from tests.hardening.conftest import QuietBars


def recipe(architecture: str, side: int = 32) -> Recipe:
    spec = {"architecture": architecture, "pretrain": {"method": "simclr"}}
    return Recipe.model_validate(
        {"name": "x", "pixels": {"height": side, "width": side}, "victim": spec, "auxiliary": spec, "bmp": spec}
    )


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_families_of_timm_can_become_a_bundle(name: str) -> None:
    """LayerNorm and GELU; hard activations, and a layer behind the last map."""
    check_encoders(recipe(name, 64), QuietBars())


def test_each_architecture_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = []
    real = preflight.to_onnx
    monkeypatch.setattr(preflight, "to_onnx", lambda *given: exported.append(given) or real(*given))
    check_encoders(recipe("resnet8_cifar"), QuietBars())
    assert len(exported) == 1


def test_an_operator_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graph._OPERATORS, "ReduceMean")
    with pytest.raises(RecipeError, match=r"auxiliary: resnet8_cifar .* the operator ReduceMean cannot be differentiated"):
        check_encoders(recipe("resnet8_cifar"), QuietBars())


class Odd(nn.Module):
    num_features = 3

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "maps":
            return x
        if self.way == "traced":
            return x.mean((2, 3)) * (2.0 if torch.compiler.is_exporting() else 1.0)
        return x.mean((2, 3)) if x.mean() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("maps", r"answers \(2, 3, 32, 32\), not"),
        ("traced", "gives other features"),
        ("branched", "cannot be exported to ONNX"),
    ],
)
def test_what_is_no_encoder_is_refused(way: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures._OWN, "odd", lambda: Odd(way))
    with pytest.raises(RecipeError, match=f"auxiliary: odd.*{said}"):
        check_encoders(recipe("odd"), QuietBars())
