"""Self-supervised pre-training on local images with lightly: for the BMP branch, and for users without a checkpoint.

SimCLR (Chen et al. 2020), BYOL (Grill et al. 2020), Barlow Twins (Zbontar et al. 2021), VICReg (Bardes et al. 2022), and
where labels exist SupCon (Khosla et al. 2020). Losses, projectors and augmentations are lightly's.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import SimCLRTransform
from lightly.utils.scheduler import cosine_schedule
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.encoders import Encoder
from hardening.files import load_tensors, save_tensors
from hardening.progress import Bars
from hardening.recipe import Pretrain, RecipeError
from hardening.training import run_epochs

_HIDDEN, _PROJECTION = 512, 128
_TEMPERATURE = 0.2
_MOMENTUM = 0.99


class _Method(nn.Module):
    """Two views of N images, [N, 3, H, W] each, and labels [N] -> a scalar loss."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("each method has its own")

    def after_step(self, progress: float) -> None:
        """Called after each update; `progress` goes from 0 to 1."""


class _Joint(_Method):
    """Methods that project both views with one network and compare them: SimCLR, Barlow Twins, VICReg."""

    def __init__(self, encoder: Encoder, projector: nn.Module, criterion: nn.Module) -> None:
        super().__init__(encoder)
        self.projector, self.criterion = projector, criterion

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.projector(self.encoder(first)), self.projector(self.encoder(second)))
        return loss


class _SupCon(_Joint):
    """SupCon, L_out of Khosla et al. 2020, Eq. 2."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, heads.SimCLRProjectionHead(encoder.dim, _HIDDEN, _PROJECTION), nn.Identity())

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        views = torch.cat([self.projector(self.encoder(first)), self.projector(self.encoder(second))])
        return supcon_loss(views, labels.repeat(2))


class _BYOL(_Method):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.projector = heads.BYOLProjectionHead(encoder.dim, _HIDDEN, _PROJECTION)
        self.predictor = heads.BYOLPredictionHead(_PROJECTION, _HIDDEN, _PROJECTION)
        self.slow_encoder, self.slow_projector = copy.deepcopy(encoder), copy.deepcopy(self.projector)
        deactivate_requires_grad(self.slow_encoder)
        deactivate_requires_grad(self.slow_projector)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        def one(here: Tensor, there: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.slow_projector(self.slow_encoder(there))
            loss: Tensor = self.criterion(self.predictor(self.projector(self.encoder(here))), target)
            return loss

        return (one(first, second) + one(second, first)) / 2

    def after_step(self, progress: float) -> None:
        momentum = cosine_schedule(int(progress * 1000), 1000, _MOMENTUM, 1.0)
        update_momentum(self.encoder, self.slow_encoder, momentum)
        update_momentum(self.projector, self.slow_projector, momentum)


def supcon_loss(vectors: Tensor, labels: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """Supervised contrastive loss of vectors [N, d] with labels [N]; every label must occur at least twice."""
    unit = F.normalize(vectors, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    log_share = logits - logits.logsumexp(dim=1, keepdim=True)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    return -(log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def _method(name: str, encoder: Encoder) -> _Method:
    dim = encoder.dim
    if name == "simclr":
        projector = heads.SimCLRProjectionHead(dim, _HIDDEN, _PROJECTION)
        return _Joint(encoder, projector, NTXentLoss(temperature=_TEMPERATURE))
    if name == "vicreg":
        return _Joint(encoder, heads.VICRegProjectionHead(dim, _HIDDEN, _HIDDEN), VICRegLoss())
    if name == "barlowtwins":
        return _Joint(encoder, heads.BarlowTwinsProjectionHead(dim, _HIDDEN, _HIDDEN), BarlowTwinsLoss())
    return _BYOL(encoder) if name == "byol" else _SupCon(encoder)


def pretrain(
    encoder: Encoder,
    recipe: Pretrain,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    job: str,
    seed: int,
    folder: Path,
    device: str,
    bars: Bars,
) -> tuple[Encoder, list[dict[str, float]]]:
    """Train a copy of `encoder` on images [N, H, W, 3] uint8; returns it and a record per epoch. Resumes from `folder`.

    RecipeError where SupCon meets images without labels.
    """
    done = folder / f"{job}.pt"
    encoder = copy.deepcopy(encoder)
    if done.exists():
        saved = load_tensors(done)
        encoder.load_state_dict(saved["encoder"])
        return encoder.eval(), saved["history"]
    if recipe.method == "supcon" and (labels < 0).any():
        raise RecipeError(f"{job}: SupCon needs labelled images, train/<class>/*")

    torch.manual_seed(seed)
    method = _method(recipe.method, encoder).to(device).train()
    size = images.shape[1]
    transform = SimCLRTransform(input_size=size, gaussian_blur=0.5 if size > 64 else 0.0, normalize=None)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batch = min(recipe.batch_size, len(images))
    per_epoch = len(images) // batch  # a short last batch would upset BatchNorm
    total = recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.05 * total + 1), 0.5 * (1 + math.cos(math.pi * step / total)))
    )

    with bars.task(job, total * batch) as task:

        def epoch(number: int, generator: torch.Generator) -> dict[str, float]:
            order = torch.randperm(len(images), generator=generator).numpy()
            losses = []
            for index in range(per_epoch):
                chosen = order[index * batch : (index + 1) * batch]
                views = [transform(Image.fromarray(images[i])) for i in chosen]
                first, second = (torch.stack([view[k] for view in views]).to(device) for k in (0, 1))
                loss = method(first, second, torch.as_tensor(labels[chosen], device=device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                method.after_step((number * per_epoch + index) / total)
                losses.append(loss.item())
                task.advance(batch, f"epoch {number + 1}/{recipe.epochs} loss {losses[-1]:.2f}")
            record = {"loss": float(np.mean(losses))}
            bars.say(f"{job} {recipe.method} epoch {number + 1}/{recipe.epochs}: loss {record['loss']:.4g}")
            return record

        parts = {"method": method, "optimiser": optimiser, "schedule": schedule}
        history = run_epochs(job, recipe.epochs, seed, folder / f"{job}.checkpoint.pt", parts, epoch)
    save_tensors(done, {"encoder": encoder.state_dict(), "history": history})
    (folder / f"{job}.checkpoint.pt").unlink(missing_ok=True)
    return encoder.cpu().eval(), history
