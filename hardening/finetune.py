"""Fine-tune an encoder: adversarially for MPAE, on clean images or by weaker attacks for BMP.

ZePAD (ICLR 2026) section 3 and Gen-AF (S&P 2024) stage 1, with the flaws of their published code mended: the attack sees
normalised images (the normalisation is part of the encoder), its gradients never reach the weights, it starts at random,
the regulariser is a mean over images, and the epoch is chosen on a validation split. Two things are ours: BatchNorm keeps
the public encoder's statistics, folded into the convolutions where that is possible and frozen where it is not, so that
adversarial batches cannot spoil them; and an anchor keeps the tuned features near the public encoder's, because the product
is an embedding, not a classifier.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.pgd import pgd
from hardening.encoders import Encoder, as_input, features, fold_batch_norm
from hardening.files import load_tensors, save_tensors
from hardening.progress import Bars
from hardening.recipe import Finetune
from hardening.relation import feature_relation, genaf_relation
from hardening.training import run_epochs

_VALIDATION_IMAGES = 256
_VALIDATION_STEPS = 5
_WARM_UP = 0.05


class Best:
    """The weights of the best epoch so far, as part of the checkpoint."""

    def __init__(self) -> None:
        self.value = -math.inf
        self.state: dict[str, Tensor] = {}

    def offer(self, value: float, module: nn.Module) -> None:
        """Keep the module's weights if `value` is larger than every one before."""
        if value > self.value:
            self.value = value
            self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """For `run_epochs`."""
        return {"value": self.value, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `run_epochs`."""
        self.value, self.state = state["value"], state["state"]


def finetune(
    encoder: Encoder,
    recipe: Finetune,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    validation: tuple[NDArray[np.uint8], NDArray[np.int64]],
    *,
    job: str,
    seed: int,
    folder: Path,
    device: str,
    bars: Bars,
) -> tuple[Encoder, list[dict[str, float]]]:
    """Tune a copy of `encoder` on images [N, H, W, 3] uint8 and labels [N]; returns it and a record per epoch.

    Without labels (all -1) the attack maximises the distance of the features instead of the cross-entropy, and only the
    regularisers teach. The epoch with the best mean of clean and attacked validation accuracy is kept; without labels,
    that of the smallest validation loss. Without labels and with `epsilon: 0` it stays as it is. Resumes from `folder`.
    """
    done = folder / f"{job}.pt"
    tuned = copy.deepcopy(encoder)
    fold_batch_norm(tuned, as_input(train[0][:8], "cpu"))
    tuned.to(device)
    # The public encoder, as it was: what the anchor and the relations refer to.
    public = copy.deepcopy(tuned).requires_grad_(False).eval()
    if done.exists():
        saved = load_tensors(done)
        tuned.load_state_dict(saved["encoder"])
        return tuned.cpu().eval(), saved["history"]

    labelled = bool((train[1] >= 0).all())
    if not labelled and recipe.epsilon == 0 and recipe.epochs:
        # Every term of the loss is 0 at the start, and Adam would make whole steps of its rounding errors.
        bars.say(f"{job}: without labels and without an epsilon there is nothing to learn; the encoder stays as it is")
        recipe = recipe.model_copy(update={"epochs": 0})
    found = features(public, train[0], device=device)
    centre, scale = found.mean(dim=0), found.std(dim=0)
    scale = scale.clamp_min(0.1 * scale.mean()).clamp_min(1e-6)
    head = first_head((found - centre) / scale, train[1], labelled).to(device)
    centre, scale = centre.to(device), scale.to(device)
    trainer = _Trainer(recipe, tuned, public, head, centre, scale, labelled, device)
    per_epoch = math.ceil(len(train[0]) / recipe.batch_size)
    steps = recipe.epochs * per_epoch
    optimiser = torch.optim.AdamW(
        [
            {"params": tuned.parameters(), "lr": recipe.learning_rate},
            {"params": head.parameters(), "lr": recipe.head_learning_rate},
        ],
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, steps))
    best = Best()

    with bars.task(job, recipe.epochs * len(train[0])) as task:

        def epoch(number: int, generator: torch.Generator) -> dict[str, float]:
            tuned.eval()  # nothing in the encoder behaves differently in training: BatchNorm is folded or frozen
            order = torch.randperm(len(train[0]), generator=generator).numpy()
            losses = []
            for start in range(0, len(order), recipe.batch_size):
                chosen = order[start : start + recipe.batch_size]
                if len(chosen) < 2:
                    continue
                images = augment(as_input(train[0][chosen], device), recipe, generator)
                labels = torch.as_tensor(train[1][chosen], device=device)
                done_share = (number * per_epoch + start // recipe.batch_size + 1) / steps
                loss = trainer.loss(images, labels, min(1.0, done_share / recipe.ramp), generator)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_([*tuned.parameters(), *head.parameters()], 5.0)
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                task.advance(len(chosen), f"epoch {number + 1}/{recipe.epochs} loss {losses[-1]:.2f}")
            record = {"loss": float(np.mean(losses)), **trainer.validate(*validation, generator)}
            best.offer(record["selection"], tuned)
            said = " ".join(f"{name} {value:.4g}" for name, value in record.items())
            bars.say(f"{job} epoch {number + 1}/{recipe.epochs}: {said}")
            return record

        parts = {"encoder": tuned, "head": head, "optimiser": optimiser, "schedule": schedule, "best": best}
        history = run_epochs(job, recipe.epochs, seed, folder / f"{job}.checkpoint.pt", parts, epoch)
    if best.state:
        tuned.load_state_dict(best.state)
    interpolate(tuned, public, recipe.interpolation)
    save_tensors(done, {"encoder": tuned.state_dict(), "history": history})
    (folder / f"{job}.checkpoint.pt").unlink(missing_ok=True)
    return tuned.cpu().eval(), history


def interpolate(tuned: Encoder, public: Encoder, share: float) -> None:
    """Move the weights of `tuned` back towards those it started from; `share` of the way from there to here remains.

    Robust fine-tuning by weight interpolation (WiSE-FT; Wortsman et al., CVPR 2022, section 3), there against distribution
    shift. It needs tuning mild enough that the way between the two is straight.
    """
    start, ends = public.state_dict(), tuned.state_dict()
    # Counters of BatchNorm, where it stayed, are whole numbers and did not move.
    mixed = {name: start[name].lerp(end, share) if end.is_floating_point() else end for name, end in ends.items()}
    tuned.load_state_dict(mixed)


class _Trainer:
    """The loss of one batch, and the accuracy on the validation split."""

    def __init__(
        self,
        recipe: Finetune,
        tuned: Encoder,
        public: Encoder,
        head: nn.Linear,
        centre: Tensor,
        scale: Tensor,
        labelled: bool,
        device: str,
    ) -> None:
        self.recipe, self.tuned, self.public, self.head = recipe, tuned, public, head
        self.centre, self.scale, self.labelled, self.device = centre, scale, labelled, device
        self.epsilon = recipe.epsilon / 255

    def standard(self, encoder: Encoder, images: Tensor) -> Tensor:
        """Features on a common scale: those after a ReLU otherwise point all into nearly the same direction.

        On an NVIDIA card the encoder computes in bfloat16; weights, head and losses stay in float32.
        """
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            features: Tensor = encoder(images)
        return (features.float() - self.centre) / self.scale

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.standard(self.tuned, images))
        return logits

    def attack(self, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator, share: float = 1.0) -> Tensor:
        epsilon = share * self.epsilon
        if epsilon == 0:
            return images
        if self.labelled:

            def loss(x: Tensor) -> Tensor:
                return F.cross_entropy(self.logits(x), labels, reduction="none")
        else:
            with torch.no_grad():
                clean = self.standard(self.tuned, images)

            def loss(x: Tensor) -> Tensor:
                return 1 - F.cosine_similarity(self.standard(self.tuned, x), clean)

        # 2.5 epsilon / steps lets every pixel cross the ball (Madry et al. 2018); one step goes to its edge.
        step_size = epsilon * min(1.25, 2.5 / steps)
        return pgd(images, loss, epsilon=epsilon, steps=steps, step_size=step_size, generator=generator)

    def loss(self, images: Tensor, labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """`share` of the full budget: the ramp has not reached it yet."""
        recipe = self.recipe
        adversarial = self.attack(images, labels, recipe.steps, generator, share)
        with torch.no_grad():
            public = self.standard(self.public, images)
        features = self.standard(self.tuned, adversarial)
        total = recipe.anchor_weight * (1 - F.cosine_similarity(features, public)).mean()
        if recipe.relation == "features" or not self.labelled:
            total = total + recipe.relation_weight * feature_relation(features, public)
        if self.labelled:
            logits = self.head(features)
            total = total + F.cross_entropy(logits, labels)
            genaf = recipe.relation == "genaf_logits"
            if self.epsilon and (recipe.clean_weight or genaf):
                clean = self.logits(images)
                total = total + recipe.clean_weight * F.cross_entropy(clean, labels)
                if genaf:
                    total = total + recipe.relation_weight * genaf_relation(clean, logits, labels)
        return total

    def validate(self, images: NDArray[np.uint8], labels: NDArray[np.int64], generator: torch.Generator) -> dict[str, float]:
        right: dict[str, list[Tensor]] = {"clean": [], "robust": []}
        images, labels = (
            images[:: max(1, len(images) // _VALIDATION_IMAGES)],
            labels[:: max(1, len(labels) // _VALIDATION_IMAGES)],
        )
        losses = []
        for start in range(0, len(images), self.recipe.batch_size):
            x = as_input(images[start : start + self.recipe.batch_size], self.device)
            y = torch.as_tensor(labels[start : start + self.recipe.batch_size], device=self.device)
            attacked = self.attack(x, y, _VALIDATION_STEPS, generator)
            with torch.no_grad():
                if self.labelled:
                    right["clean"].append(self.logits(x).argmax(1) == y)
                    right["robust"].append(self.logits(attacked).argmax(1) == y)
                else:
                    public = self.standard(self.public, x)
                    losses.append(1 - F.cosine_similarity(self.standard(self.tuned, attacked), public))
        if not self.labelled:
            distance = torch.cat(losses).mean().item()
            return {"distance": distance, "selection": -distance}
        clean, robust = (torch.cat(right[kind]).float().mean().item() for kind in ("clean", "robust"))
        return {"clean_acc": clean, "robust_acc": robust, "selection": (clean + robust) / 2}


def augment(images: Tensor, recipe: Finetune, generator: torch.Generator) -> Tensor:
    """Mirror and crop images [N, 3, H, W] at random, each on its own; crops are resized back."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).to(images.device)

    side = uniform(recipe.crop, 1.0)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if recipe.flip else torch.ones(n, device=images.device)
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * side, side
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - side), uniform(-1, 1) * (1 - side)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def first_head(standardised: Tensor, labels: NDArray[np.int64], labelled: bool) -> nn.Linear:
    """A head that already reads the public features: a random one would first tear them apart (Kumar et al. 2022)."""
    if not labelled:
        return nn.Linear(standardised.shape[1], 1)
    fitted = LogisticRegression(C=0.01, max_iter=200).fit(standardised.numpy(), labels)
    head = nn.Linear(standardised.shape[1], len(fitted.classes_))
    # scikit-learn keeps one row of weights for two classes.
    weight = np.concatenate([-fitted.coef_, fitted.coef_]) / 2 if len(fitted.classes_) == 2 else fitted.coef_
    bias = np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2 if len(fitted.classes_) == 2 else fitted.intercept_
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight))
        head.bias.copy_(torch.as_tensor(bias))
    return head


def cosine(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a short warm-up, then half a cosine down to 0."""
    warm = max(1, int(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))
