from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hardening.architectures import CifarResNet, _ZeroPadShortcut, create
from hardening.recipe import RecipeError


@pytest.mark.parametrize(
    ("name", "size", "features", "parameters"),
    [
        # 171,856 less the two layers of the third-party checkpoint that are no encoder: see its MANIFEST.
        ("resnet8_cifar", 32, 64, None),
        ("resnet14_cifar", 32, 64, 171_856),
        ("resnet14_cifar_w32", 32, 128, None),
        ("resnet20_cifar", 32, 64, None),
        ("resnet18_cifar", 32, 512, 11_168_832),
        ("test_resnet", 32, 0, None),
    ],
)
def test_names_become_networks_without_a_classifier(name: str, size: int, features: int, parameters: int | None) -> None:
    network = create(name).eval()
    dim = features or network.num_features
    with torch.no_grad():
        assert network(torch.rand(2, 3, size, size)).shape == (2, dim)
    assert network.num_features == dim
    if parameters is not None:
        assert sum(p.numel() for p in network.parameters()) == parameters


def test_blocks_and_width_of_the_cifar_resnet() -> None:
    # 6n + 2 layers (He et al. 2016, section 4.2): n blocks of two convolutions in each of three stages, and the stem.
    convolutions = [m for m in CifarResNet(3, 16).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 3 * 3 * 2
    assert [m.stride for m in convolutions].count((2, 2)) == 2


def test_the_stem_for_small_pictures_does_not_shrink_them() -> None:
    network = create("resnet18_cifar")
    assert network.maxpool(network.conv1(torch.rand(1, 3, 32, 32))).shape == (1, 64, 32, 32)  # type: ignore[operator]


def test_the_shortcut_subsamples_and_fills_with_zeros_on_both_sides() -> None:
    x = torch.rand(2, 4, 6, 6)
    out = _ZeroPadShortcut(2, 4)(x)
    expected = np.zeros((2, 8, 3, 3), np.float32)
    expected[:, 2:6] = x.numpy()[:, :, ::2, ::2]
    np.testing.assert_array_equal(out.numpy(), expected)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(RecipeError, match=r"near are .*resnet14_cifar"):
        create("resnet14_cifr")
    with pytest.raises(RecipeError, match=r"near are .*tf_efficientnet_lite0"):
        create("tf_efficientnet_light0")


def test_a_pattern_is_no_name() -> None:
    with pytest.raises(RecipeError, match="there is no architecture"):
        create("resnet*")


def test_timm_has_no_weights_for_our_own() -> None:
    with pytest.raises(RecipeError, match="timm has no weights"):
        create("resnet8_cifar", pretrained=True)


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    create("test_resnet")
    assert torch.equal(torch.rand(1), expected)


def test_padding_of_torch_is_what_the_shortcut_relies_on() -> None:
    assert F.pad(torch.ones(1, 1, 1, 1), (0, 0, 0, 0, 1, 2)).flatten().tolist() == [0, 1, 0, 0]
