"""Plain adversarial training of encoder and head: PGD-AT, TRADES, MART.

PGD-AT (Madry et al. 2018), TRADES (Zhang et al. 2019, beta 6) and MART (Wang et al. 2020, lambda 5) with their published
losses. As there, the attack meets the network in eval mode and the update in training mode, BatchNorm's statistics
included. Unlike there, every attack starts at random in the whole ball, and the epoch is chosen on a validation split.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.baselines.classifier import Classifier, Split, attack, attack_labels, validate, with_head
from hardening.encoders import Encoder, as_input
from hardening.files import load_tensors, save_tensors
from hardening.finetune import Best, augment, cosine
from hardening.progress import Bars
from hardening.recipe import Finetune
from hardening.training import run_epochs

Method = Literal["pgd_at", "trades", "mart"]
_TRADES_BETA = 6.0
_MART_LAMBDA = 5.0
_TINY = 1e-12


def train(
    encoder: Encoder,
    method: Method,
    train: Split,
    validation: Split,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    epsilon: float = 8.0,
    steps: int = 10,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 5e-3,
    weight_decay: float = 8e-4,
    flip: bool = True,
    crop: float = 0.7,
    seed: int,
    folder: Path,
    job: str,
    device: str,
    bars: Bars,
) -> tuple[Encoder, nn.Module]:
    """Train a copy of `encoder`, and a head, on images [N, H, W, 3] uint8 and labels 0..C-1 [N]; returns both, on the CPU.

    `epsilon` in 1/255. The epoch with the best mean of clean and attacked validation accuracy is kept. Resumes from
    `folder`, which a job of another method must not share under the same name.
    """
    done = folder / f"{job}.pt"
    classifier = with_head(copy.deepcopy(encoder), train, device)
    if done.exists():
        classifier.load_state_dict(load_tensors(done)["classifier"])
        classifier.cpu().eval()
        return classifier.encoder, classifier.head

    optimiser = torch.optim.AdamW(
        [
            {"params": classifier.encoder.parameters(), "lr": learning_rate},
            {"params": classifier.head.parameters(), "lr": head_learning_rate},
        ],
        weight_decay=weight_decay,
    )
    total = epochs * math.ceil(len(train[0]) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, total))
    moves = Finetune(flip=flip, crop=crop)
    best = Best()

    with bars.task(job, epochs * len(train[0])) as task:

        def epoch(number: int, generator: torch.Generator) -> dict[str, float]:
            classifier.train()
            order = torch.randperm(len(train[0]), generator=generator).numpy()
            losses = []
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                if len(chosen) < 2:
                    continue
                images = augment(as_input(train[0][chosen], device), moves, generator)
                labels = torch.as_tensor(train[1][chosen], device=device)
                adversarial = _adversarial(method, classifier, images, labels, epsilon, steps, generator)
                loss = _loss(method, classifier, images, adversarial, labels)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(classifier.parameters(), 5.0)
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                task.advance(len(chosen), f"epoch {number + 1}/{epochs} loss {losses[-1]:.2f}")
            found = validate(
                classifier, validation, epsilon=epsilon, batch_size=batch_size, generator=generator, device=device
            )
            record = {"loss": float(np.mean(losses)), **found}
            best.offer(record["selection"], classifier)
            said = " ".join(f"{name} {value:.4g}" for name, value in record.items())
            bars.say(f"{job} {method} epoch {number + 1}/{epochs}: {said}")
            return record

        parts = {"classifier": classifier, "optimiser": optimiser, "schedule": schedule, "best": best}
        history = run_epochs(job, epochs, seed, folder / f"{job}.checkpoint.pt", parts, epoch)
    if best.state:
        classifier.load_state_dict(best.state)
    save_tensors(done, {"classifier": classifier.state_dict(), "history": history})
    (folder / f"{job}.checkpoint.pt").unlink(missing_ok=True)
    classifier.cpu().eval()
    return classifier.encoder, classifier.head


def _adversarial(
    method: Method,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    if method != "trades":
        return attack_labels(classifier, images, labels, epsilon=epsilon, steps=steps, generator=generator)
    # TRADES needs no label to attack: away from what the network says of the clean image.
    classifier.eval()
    with torch.no_grad():
        clean = classifier(images).softmax(1)
    classifier.train()
    return attack(classifier, images, lambda logits: _kl(clean, logits), epsilon=epsilon, steps=steps, generator=generator)


def _loss(method: Method, classifier: Classifier, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    if method == "pgd_at":
        return F.cross_entropy(classifier(adversarial), labels)
    return (trades_loss if method == "trades" else mart_loss)(classifier(images), classifier(adversarial), labels)


def trades_loss(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float = _TRADES_BETA) -> Tensor:
    """Logits [N, C] of clean and attacked images: cross-entropy of the clean, beta times the KL divergence between both."""
    return F.cross_entropy(clean, labels) + beta * _kl(clean.softmax(1), adversarial).mean()


def mart_loss(clean: Tensor, adversarial: Tensor, labels: Tensor, weight: float = _MART_LAMBDA) -> Tensor:
    """Logits [N, C]: boosted cross-entropy of the attacked, and KL weighted by how unsure the clean image is.

    Boosted: -log p_y - log(1 - the largest other p). The KL of each image is weighted with 1 - p_y of the clean one.
    """
    own = F.one_hot(labels, clean.shape[1]).bool()
    other = adversarial.softmax(1).masked_fill(own, 0).amax(1)
    boosted = F.cross_entropy(adversarial, labels) - (1.0001 - other + _TINY).log().mean()
    unsure = 1 - clean.softmax(1)[own]
    return boosted + weight * (_kl(clean.softmax(1), adversarial) * unsure).mean()


def _kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) of each image, [N]."""
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
