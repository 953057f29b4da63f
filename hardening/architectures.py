"""Networks by name: the small CIFAR ones here, everything else from timm."""

from __future__ import annotations

import difflib

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.recipe import RecipeError


class _ZeroPadShortcut(nn.Module):
    """Option A of He et al. 2016, section 4.2: subsample, and fill the new channels with zeros on both sides."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        keep = stride == 1 and inputs == planes
        self.shortcut: nn.Module = nn.Identity() if keep else _ZeroPadShortcut(stride, planes - inputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016: 3x3 stem without pooling, three stages, parameter-free shortcuts.

    [N, 3, H, W] -> [N, 4 * width].
    """

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, planes in enumerate((width, 2 * width, 4 * width), start=1):
            layers = []
            for block in range(blocks):
                layers.append(_BasicBlock(inputs, planes, 2 if stage > 1 and block == 0 else 1))
                inputs = planes
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.forward_head(self.forward_intermediates(x)[0])

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """timm's name: [N, 3, H, W] -> the last map, and the map of each stage."""
        maps = [F.relu(self.bn1(self.conv1(x)))]
        for stage in ("layer1", "layer2", "layer3"):
            maps.append(self.get_submodule(stage)(maps[-1]))
        return maps[-1], maps[1:]

    def forward_head(self, last: Tensor) -> Tensor:
        """timm's name: the last map -> [N, 4 * width]."""
        return last.mean((2, 3))


def _resnet18_cifar() -> nn.Module:
    """solo-learn's ResNet-18 for 32 x 32 images: 3x3 stem of stride 1, no pooling."""
    network = timm.create_model("resnet18", num_classes=0)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network  # type: ignore[no-any-return]


_OWN = {
    "resnet8_cifar": lambda: CifarResNet(1, 16),
    "resnet14_cifar": lambda: CifarResNet(2, 16),
    "resnet14_cifar_w32": lambda: CifarResNet(2, 32),
    "resnet20_cifar": lambda: CifarResNet(3, 16),
    "resnet18_cifar": _resnet18_cifar,
}


def create(name: str, *, pretrained: bool = False) -> nn.Module:
    """Build a network without a classifier: images [N, 3, H, W] -> features [N, d].

    RecipeError with the nearest names where there is none of this name. `pretrained` lets timm download its weights.
    """
    if name in _OWN:
        if pretrained:
            raise RecipeError(f"{name} is no timm architecture: timm has no weights for it")
        return _OWN[name]()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*_OWN, *timm.list_models()], n=3)
        raise RecipeError(f"there is no architecture {name!r}; near are {', '.join(close) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0)  # type: ignore[no-any-return]
        except RuntimeError as error:  # a tag of weights that there is not, or none at all
            raise RecipeError(f"timm has no weights for {name!r}: {error}") from None
