from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardening.baselines.classifier import Classifier, validate, with_head
from hardening.baselines.gen_af import adapt, chosen_parameters, layer_robustness, lowest, train, unfold
from hardening.encoders import Encoder, as_input, features, fold_batch_norm
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import patterns

TRAIN, VALIDATION, TEST = patterns(24, seed=1), patterns(8, seed=2), patterns(15, seed=3)


def run(encoder: Encoder, folder: Path, *, bars: QuietBars | None = None, **more: Any) -> tuple[Classifier, dict[str, float]]:
    sizes = {"epochs": 2, "adapt_epochs": 1, "layer_epochs": 1, "layer_images": 32, "batch_size": 32, "steps": 2} | more
    tuned, head, layers = train(
        encoder,
        TRAIN,
        VALIDATION,
        learning_rate=3e-3,
        flip=False,
        crop=0.9,
        seed=4,
        folder=folder,
        job="af",
        device="cpu",
        bars=bars or QuietBars(),
        **sizes,
    )
    return Classifier(tuned, head).eval(), layers  # type: ignore[arg-type]


def identical(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def scores(classifier: Classifier) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    return validate(classifier, TEST, epsilon=8, batch_size=60, generator=generator, device="cpu")


def test_it_withstands_more_than_the_undefended(toy_encoder: Encoder, tmp_path: Path) -> None:
    before = scores(with_head(copy.deepcopy(toy_encoder), TRAIN, "cpu"))
    given = copy.deepcopy(toy_encoder)
    tuned, layers = run(toy_encoder, tmp_path, epochs=30, adapt_epochs=2)
    after = scores(tuned)
    assert after["robust_acc"] > before["robust_acc"] + 0.15
    assert after["clean_acc"] > 0.6
    assert identical(given, toy_encoder)
    weighted = {name for name, module in tuned.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert set(layers) == weighted
    # A maximised loss rises.
    assert max(layers.values()) > 0


def test_stopped_and_started_again_it_ends_with_the_same_weights(toy_encoder: Encoder, tmp_path: Path) -> None:
    """Stage 1 has six steps, the dictionary one a layer, stage 2 three an epoch: stopped once in each."""
    whole, layers = run(toy_encoder, tmp_path / "whole", adapt_epochs=2)
    for after in (4, 2 + len(layers) // 2, len(layers) - len(layers) // 2 + 4):
        with pytest.raises(Interrupted):
            run(toy_encoder, tmp_path / "stopped", bars=InterruptingBars(after), adapt_epochs=2)
        torch.manual_seed(99)
    again, layers_again = run(toy_encoder, tmp_path / "stopped", adapt_epochs=2)
    assert identical(whole, again)
    assert layers == layers_again
    bars = QuietBars()
    assert identical(whole, run(toy_encoder, tmp_path / "stopped", bars=bars, adapt_epochs=2)[0])
    assert bars.said == []


def changed(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    return {name for name, value in after.state_dict().items() if not torch.equal(before[name], value)}


def tune_layers(classifier: Classifier, folder: Path, layers: list[str], *, faithful: bool) -> None:
    adapt(
        classifier,
        layers,
        TRAIN,
        VALIDATION,
        epochs=1,
        batch_size=32,
        epsilon=8,
        learning_rate=1e-2,
        faithful=faithful,
        job="adapt",
        seed=1,
        folder=folder,
        device="cpu",
        bars=QuietBars(),
    )


CONV1 = "encoder.network.conv1"
OTHERS = {f"encoder.network.layer{stage}.0.conv1.weight" for stage in (1, 2, 3)}


def test_only_the_named_layers_change_and_frozen_batch_norm_does_not(toy_encoder: Encoder, tmp_path: Path) -> None:
    classifier = with_head(toy_encoder, TRAIN, "cpu")
    before = copy.deepcopy(classifier.state_dict())
    tune_layers(classifier, tmp_path, [CONV1, "head.linear"], faithful=False)
    assert changed(before, classifier) == {f"{CONV1}.weight", "head.linear.weight", "head.linear.bias"}


def test_faithful_means_parts_of_names_and_counting_batch_norms(toy_encoder: Encoder, tmp_path: Path) -> None:
    classifier = with_head(toy_encoder, TRAIN, "cpu")
    before = copy.deepcopy(classifier.state_dict())
    tune_layers(classifier, tmp_path, [CONV1], faithful=True)
    counted = ("running_mean", "running_var", "num_batches_tracked")
    assert changed(before, classifier) == {f"{CONV1}.weight", *OTHERS} | {n for n in before if n.endswith(counted)}


def test_names_that_lie_inside_others(toy_encoder: Encoder) -> None:
    classifier = with_head(toy_encoder, TRAIN, "cpu")
    assert chosen_parameters(classifier, [CONV1], faithful=False) == [f"{CONV1}.weight"]
    assert set(chosen_parameters(classifier, [CONV1], faithful=True)) == {f"{CONV1}.weight", *OTHERS}


def test_the_lowest_fifth() -> None:
    layers = {f"layer{number}": value for number, value in enumerate((0.5, 0.1, -0.2, 0.9, 0.3, 0.0, 0.7, 0.8, 0.6, 1.0))}
    assert lowest(layers) == ["layer2", "layer5"]
    assert lowest({"a": 2.0, "b": 1.0}) == ["b"]
    assert len(lowest({str(number): 0.0 for number in range(23)})) == 4


def test_the_dictionary_leaves_the_network_and_grows_with_the_epochs(toy_encoder: Encoder, tmp_path: Path) -> None:
    classifier = with_head(toy_encoder, TRAIN, "cpu")
    before = copy.deepcopy(classifier)
    found = [
        layer_robustness(
            classifier,
            TRAIN,
            epochs=epochs,
            batch_size=32,
            epsilon=8,
            steps=2,
            job="layers",
            seed=1,
            folder=tmp_path / str(epochs),
            device="cpu",
            bars=QuietBars(),
        )
        for epochs in (1, 3)
    ]
    assert identical(before, classifier)
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    # The same attack, and the worst of three epochs is no better than the first.
    assert all(found[1][name] >= found[0][name] - 1e-6 for name in found[0])
    assert all(value > 0 for value in found[1].values())


def test_unfolding_is_exact(toy_encoder: Encoder) -> None:
    x = as_input(TRAIN[0][:8])
    folded = copy.deepcopy(toy_encoder)
    assert fold_batch_norm(folded, x)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.mul_(1.1)  # as if tuned
    whole = unfold(toy_encoder, folded)
    assert set(whole.state_dict()) == set(toy_encoder.state_dict())
    assert torch.allclose(features(whole, TEST[0]), features(folded, TEST[0]), atol=1e-4, rtol=1e-4)
    # What was never folded stays.
    assert identical(unfold(toy_encoder, toy_encoder), toy_encoder)
