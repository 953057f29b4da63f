"""What is known of a recipe's encoders before hours are spent on them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardening import encoders
from hardening.encoders import Encoder, as_input
from hardening.export import made_up_images, to_onnx
from hardening.graph import Graph, GraphError
from hardening.progress import Bars
from hardening.recipe import ROLES, EncoderSpec, Recipe, RecipeError

_TOLERANCE = 1e-3
"""Of the largest feature: torch and the graph sum in other orders."""


def check_encoders(recipe: Recipe, bars: Bars) -> None:
    """Build each encoder and send two made-up pictures through it, and through the graph that a bundle would hold of it.

    RecipeError names the role whose architecture does not take pictures of this size, or cannot be exported or attacked;
    EncoderError and RecipeError as `encoders.build`.
    """
    images = made_up_images(recipe.pixels.height, recipe.pixels.width)[:2]
    seen: set[str] = set()
    with bars.task("try the encoders", len(ROLES)) as task:
        for role in ROLES:
            spec: EncoderSpec = getattr(recipe, role)
            encoder = encoders.build(spec, 0, None, encoders.draw_key() if spec.keyed else None)
            what = f"{role}: {spec.architecture}"
            try:
                with torch.no_grad():
                    expected = encoder.readout(as_input(images))
            except Exception as error:  # networks refuse a size in ways of their own
                size = f"{recipe.pixels.height} x {recipe.pixels.width}"
                raise RecipeError(f"{what} does not take pictures of {size} ({error})") from error
            if expected[""].shape != (2, encoder.dim):
                raise RecipeError(
                    f"{what} answers {tuple(expected[''].shape)}, not one row of {encoder.dim} features a picture"
                )
            if spec.architecture not in seen:
                seen.add(spec.architecture)
                _check_graph(what, encoder, images, expected)
            task.advance(1, role)


class _Readout(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, H, W, 3] -> what `Encoder.readout` has, in its order."""
        return tuple(self.encoder.readout(images.permute(0, 3, 1, 2).float() / 255).values())


def _check_graph(what: str, encoder: Encoder, images: NDArray[np.uint8], expected: dict[str, Tensor]) -> None:
    names = [f"part{number}" for number in range(len(expected))]
    try:
        model = to_onnx(_Readout(encoder), images, names)
        found = Graph(model.SerializeToString())(as_input(images), names)
    except GraphError as error:
        raise RecipeError(f"{what} can be trained, but the bundle could not be attacked and measured: {error}") from None
    except Exception as error:  # the exporter's own, of many kinds
        raise RecipeError(f"{what} cannot be exported to ONNX ({str(error).strip().splitlines()[0]})") from error
    for name, want in zip(names, expected.values(), strict=True):
        if not (found[name] - want).abs().max() <= _TOLERANCE * want.abs().max():
            raise RecipeError(f"{what}: its graph gives other features than the network itself")
