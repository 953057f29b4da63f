"""Gen-AF (S&P 2024): adversarial fine-tuning with its genetic regulariser, then clean tuning of the layers that bear it.

Stage 1 is `hardening.finetune` with Gen-AF's relation between logits. Stage 2, "evolutionary adaptability", asks of every
convolution and linear layer how much a small change of its weights can raise the loss on attacked images, and tunes the
fifth that matters least on clean images. Everything is learnt from the job's own data; the published dictionary is of STL10.

`faithful` brings back what the published stage 2 does by accident: layers are chosen by a part of their name, so that
`0.conv1` frees `0.layer1.0.conv1` as well, and BatchNorm goes on counting in layers that are meant to be frozen. The attack
on images that were not normalised is not brought back: here the normalisation is part of the encoder.
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hardening.baselines.classifier import Classifier, Split, attack_labels, validate, with_head
from hardening.encoders import Encoder, ScaledConv2d, as_input
from hardening.files import load_tensors, save_tensors
from hardening.finetune import Best, finetune
from hardening.progress import Bars
from hardening.recipe import Finetune
from hardening.training import run_epochs, seed_everything

_SHARE = 0.2
_BUDGET = 0.1
_LAYER_RATE = 1.0
_WEIGHT_DECAY = 8e-4


def train(
    encoder: Encoder,
    train: Split,
    validation: Split,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    epsilon: float = 8.0,
    steps: int = 10,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 5e-3,
    relation_weight: float = 20.0,
    layer_images: int = 1024,
    layer_epochs: int = 10,
    adapt_epochs: int = 20,
    adapt_learning_rate: float = 1e-3,
    faithful: bool = False,
    flip: bool = True,
    crop: float = 0.7,
    seed: int,
    folder: Path,
    job: str,
    device: str,
    bars: Bars,
) -> tuple[Encoder, nn.Module, dict[str, float]]:
    """Both stages on a copy of `encoder`; images [N, H, W, 3] uint8 and labels 0..C-1 [N].

    Returns encoder, head and the dictionary of `layer_robustness`, on the CPU. Stage 1 keeps no head, so one is fitted to
    what it made of the encoder. `relation_weight` multiplies a mean over images (published: a sum). Resumes from `folder`.
    """
    recipe = Finetune(
        epochs=epochs,
        batch_size=batch_size,
        epsilon=epsilon,
        steps=steps,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        weight_decay=_WEIGHT_DECAY,
        clean_weight=0.0,
        anchor_weight=0.0,
        relation="genaf_logits",
        relation_weight=relation_weight,
        flip=flip,
        crop=crop,
    )
    shared = {"seed": seed, "folder": folder, "device": device, "bars": bars}
    tuned, _ = finetune(encoder, recipe, train, validation, job=f"{job}.stage1", **shared)  # type: ignore[arg-type]
    classifier = with_head(unfold(encoder, tuned), train, device)
    every = max(1, math.ceil(len(train[0]) / layer_images))
    layers = layer_robustness(
        classifier,
        (train[0][::every], train[1][::every]),
        epochs=layer_epochs,
        batch_size=batch_size,
        epsilon=epsilon,
        steps=steps,
        job=f"{job}.layers",
        **shared,  # type: ignore[arg-type]
    )
    adapt(
        classifier,
        lowest(layers),
        train,
        validation,
        epochs=adapt_epochs,
        batch_size=batch_size,
        epsilon=epsilon,
        learning_rate=adapt_learning_rate,
        faithful=faithful,
        job=f"{job}.stage2",
        **shared,  # type: ignore[arg-type]
    )
    return classifier.encoder, classifier.head, layers


def unfold(public: Encoder, tuned: Encoder) -> Encoder:
    """`tuned` with the BatchNorm layers that `public` has and `fold_batch_norm` took from it; it computes the same.

    The published dictionary is of convolutions' own weights, and its quirk with BatchNorm needs one.
    """
    whole = copy.deepcopy(tuned)
    for name, parent in public.named_modules():
        there = whole.get_submodule(name)
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(parent.named_children()):
            folded = getattr(there, conv_name)
            if not (isinstance(folded, ScaledConv2d) and isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            conv, norm = copy.deepcopy(conv), copy.deepcopy(norm)
            assert norm.running_var is not None
            assert norm.running_mean is not None
            assert folded.bias is not None
            with torch.no_grad():
                gain = folded.gain.flatten()
                before = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
                conv.weight.copy_(folded.weight)
                norm.weight.copy_(gain * torch.sqrt(norm.running_var + norm.eps))
                norm.bias.copy_(folded.bias - gain * (before - norm.running_mean))
            setattr(there, conv_name, conv)
            setattr(there, norm_name, norm)
    return whole.eval()


def layer_robustness(
    classifier: Classifier,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    epsilon: float,
    steps: int,
    job: str,
    seed: int,
    folder: Path,
    device: str,
    bars: Bars,
) -> dict[str, float]:
    """How far the loss on attacked images rises when one layer's weights may move by a tenth of their norm; by layer.

    The images are attacked once. SGD then maximises their cross-entropy over one weight tensor at a time; a change is
    scaled back into the ball after every step (published: every epoch), so that it cannot run away.
    """
    classifier = copy.deepcopy(classifier).to(device).eval().requires_grad_(False)
    names = [name for name, module in classifier.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    labels = torch.as_tensor(split[1], device=device)
    generator = seed_everything(seed, job, "attack")
    attacked = []
    starts = range(0, len(labels), batch_size)
    for start in starts:
        images, y = as_input(split[0][start : start + batch_size], device), labels[start : start + batch_size]
        attacked.append(attack_labels(classifier, images, y, epsilon=epsilon, steps=steps, generator=generator))
    adversarial = torch.cat(attacked)

    @torch.no_grad()
    def set_loss() -> float:
        total = 0.0
        for start in starts:
            batch = slice(start, start + batch_size)
            total += F.cross_entropy(classifier(adversarial[batch]), labels[batch], reduction="sum").item()
        return total / len(labels)

    before = set_loss()
    with bars.task(job, len(names)) as task:

        def layer(number: int, generator: torch.Generator) -> dict[str, float]:
            weight: nn.Parameter = classifier.get_submodule(names[number]).weight  # type: ignore[assignment]
            start = weight.detach().clone()
            limit = _BUDGET * start.norm()
            weight.requires_grad_(True)
            worst = -math.inf
            for _ in range(epochs):
                for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):  # type: ignore[no-untyped-call]
                    loss = F.cross_entropy(classifier(adversarial[chosen]), labels[chosen])
                    (gradient,) = torch.autograd.grad(loss, weight)
                    with torch.no_grad():
                        change = weight + _LAYER_RATE * gradient - start
                        weight.copy_(start + change * (limit / change.norm().clamp_min(1e-12)).clamp_max(1))
                worst = max(worst, set_loss())
            with torch.no_grad():
                weight.copy_(start)
            weight.requires_grad_(False)
            task.advance(1, names[number])
            return {"rise": worst - before}

        rises = run_epochs(job, len(names), seed, folder / f"{job}.pt", {}, layer)
    return {name: record["rise"] for name, record in zip(names, rises, strict=True)}


def lowest(layers: dict[str, float], share: float = _SHARE) -> list[str]:
    """The layers of the smallest rise: a fifth of them, rounded down, but at least one."""
    return sorted(layers, key=layers.__getitem__)[: max(1, int(share * len(layers)))]


def chosen_parameters(classifier: nn.Module, layers: list[str], *, faithful: bool) -> list[str]:
    """The parameters of exactly these layers; `faithful`: of all whose published name contains a layer's."""
    if faithful:
        parts = [_published(name) for name in layers]
        return [name for name, _ in classifier.named_parameters() if any(part in _published(name) for part in parts)]
    return [name for name, _ in classifier.named_parameters() if name.rpartition(".")[0] in layers]


def _published(name: str) -> str:
    """As in Sequential(encoder, head), which is what the published code takes its names from."""
    return name.replace("encoder.network.", "0.", 1).replace("head.", "1.", 1)


def adapt(
    classifier: Classifier,
    layers: list[str],
    train: Split,
    validation: Split,
    *,
    epochs: int,
    batch_size: int,
    epsilon: float,
    learning_rate: float,
    faithful: bool = False,
    job: str,
    seed: int,
    folder: Path,
    device: str,
    bars: Bars,
) -> list[dict[str, float]]:
    """Tune these layers of `classifier` on clean images, in place; returns a record per epoch and leaves it on the CPU.

    The epoch with the best mean of clean and attacked validation accuracy is kept; before the first there is nothing to
    keep, as in the published code. Resumes from `folder`.
    """
    done = folder / f"{job}.pt"
    if done.exists():
        saved = load_tensors(done)
        classifier.load_state_dict(saved["classifier"])
        classifier.cpu().eval()
        return saved["history"]  # type: ignore[no-any-return]
    classifier.to(device).requires_grad_(False)
    free = set(chosen_parameters(classifier, layers, faithful=faithful))
    parameters = [parameter.requires_grad_(True) for name, parameter in classifier.named_parameters() if name in free]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    best = Best()

    with bars.task(job, epochs * len(train[0])) as task:

        def epoch(number: int, generator: torch.Generator) -> dict[str, float]:
            classifier.train(faithful)
            losses = []
            for chosen in torch.randperm(len(train[0]), generator=generator).split(batch_size):  # type: ignore[no-untyped-call]
                if len(chosen) < 2:
                    continue
                images, labels = as_input(train[0][chosen.numpy()], device), train[1][chosen.numpy()]
                loss = F.cross_entropy(classifier(images), torch.as_tensor(labels, device=device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                losses.append(loss.item())
                task.advance(len(chosen), f"epoch {number + 1}/{epochs} loss {losses[-1]:.2f}")
            found = validate(
                classifier, validation, epsilon=epsilon, batch_size=batch_size, generator=generator, device=device
            )
            record = {"loss": float(np.mean(losses)), **found}
            best.offer(record["selection"], classifier)
            bars.say(f"{job} epoch {number + 1}/{epochs}: " + " ".join(f"{name} {v:.4g}" for name, v in record.items()))
            return record

        parts = {"classifier": classifier, "optimiser": optimiser, "best": best}
        history = run_epochs(job, epochs, seed, folder / f"{job}.checkpoint.pt", parts, epoch)
    if best.state:
        classifier.load_state_dict(best.state)
    save_tensors(done, {"classifier": classifier.state_dict(), "history": history})
    (folder / f"{job}.checkpoint.pt").unlink(missing_ok=True)
    classifier.cpu().eval().requires_grad_(True)
    return history
