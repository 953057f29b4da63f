"""Self-supervised pre-training on local images with lightly: for the BMP branch, and for users without a checkpoint.

SimCLR (Chen et al. 2020), MoCo v2+ (He et al. 2020; Chen et al. 2020), NNCLR (Dwibedi et al. 2021), BYOL (Grill et al. 2020),
SwAV (Caron et al. 2020), Barlow Twins (Zbontar et al. 2021), VICReg (Bardes et al. 2022), and where labels exist SupCon
(Khosla et al. 2020) or plain cross-entropy (`supervised`). Losses and projectors are lightly's; two views an image, no small
crops, augmented a batch at a time on the device (kornia): image by image, an accelerator would wait for the processor.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from kornia import augmentation
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models.modules import NNMemoryBankModule, heads
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.encoders import Encoder, as_input
from hardening.files import load_tensors, save_tensors
from hardening.progress import Bars
from hardening.recipe import Pretrain, RecipeError, SSLMethod
from hardening.training import run_epochs

_HIDDEN, _PROJECTION = 512, 128
_TEMPERATURE = 0.2
_MOMENTUM = 0.99
_QUEUE = 4096
_PROTOTYPES = 256


class _Method(nn.Module):
    """Two views of N images, [N, 3, H, W] each, and labels [N] -> a scalar loss."""

    compares = True
    """Whether the second view is looked at."""

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


class _Supervised(_Method):
    """Cross-entropy of one view: the cheapest way to a BMP branch where the local images have labels."""

    compares = False

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__(encoder)
        self.head = nn.Linear(encoder.dim, classes)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(first)), labels)


class _Momentum(_Method):
    """Methods whose targets come from a slowly following twin of encoder and projector: MoCo, BYOL."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__(encoder)
        self.projector = projector
        self.slow_encoder, self.slow_projector = copy.deepcopy(encoder), copy.deepcopy(projector)
        deactivate_requires_grad(self.slow_encoder)
        deactivate_requires_grad(self.slow_projector)

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        target: Tensor = self.slow_projector(self.slow_encoder(images))
        return target

    def after_step(self, progress: float) -> None:
        momentum = cosine_schedule(int(progress * 1000), 1000, _MOMENTUM, 1.0)
        update_momentum(self.encoder, self.slow_encoder, momentum)
        update_momentum(self.projector, self.slow_projector, momentum)


class _BYOL(_Momentum):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, heads.BYOLProjectionHead(encoder.dim, _HIDDEN, _PROJECTION))
        self.predictor = heads.BYOLPredictionHead(_PROJECTION, _HIDDEN, _PROJECTION)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        def one(here: Tensor, there: Tensor) -> Tensor:
            loss: Tensor = self.criterion(self.predictor(self.projector(self.encoder(here))), self.target(there))
            return loss

        return (one(first, second) + one(second, first)) / 2


class _MoCo(_Momentum):
    """MoCo v2+: the loss of both directions, each against a queue of earlier targets."""

    def __init__(self, encoder: Encoder, queue: int) -> None:
        super().__init__(encoder, heads.MoCoProjectionHead(encoder.dim, _HIDDEN, _PROJECTION))
        self.criterion = NTXentLoss(temperature=_TEMPERATURE, memory_bank_size=(queue, _PROJECTION))
        _keep(self.criterion.memory_bank)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        # In one call: in two, the second would find this batch's own images in the queue.
        queries = torch.cat([self.projector(self.encoder(first)), self.projector(self.encoder(second))])
        loss: Tensor = self.criterion(queries, torch.cat([self.target(second), self.target(first)]))
        return loss


class _NNCLR(_Method):
    """SimCLR, with each target replaced by its nearest neighbour among earlier ones."""

    def __init__(self, encoder: Encoder, queue: int) -> None:
        super().__init__(encoder)
        self.projector = heads.NNCLRProjectionHead(encoder.dim, _HIDDEN, _PROJECTION)
        self.predictor = heads.NNCLRPredictionHead(_PROJECTION, _HIDDEN, _PROJECTION)
        self.neighbours = NNMemoryBankModule((queue, _PROJECTION))
        _keep(self.neighbours)
        self.criterion = NTXentLoss(temperature=_TEMPERATURE)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        z, w = self.projector(self.encoder(first)), self.projector(self.encoder(second))
        loss: Tensor = self.criterion(self.neighbours(z.detach()), self.predictor(w))
        other: Tensor = self.criterion(self.neighbours(w.detach(), update=True), self.predictor(z))
        return (loss + other) / 2


class _UnitPrototypes(nn.Module):
    """A projector, and the cosines of its outputs to prototypes, which stay on the unit sphere without being reset."""

    def __init__(self, projector: nn.Module, prototypes: int) -> None:
        super().__init__()
        self.projector = projector
        self.prototypes = nn.Parameter(torch.randn(prototypes, _PROJECTION))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.projector(x), dim=1), F.normalize(self.prototypes, dim=1))


class _SwAV(_Joint):
    def __init__(self, encoder: Encoder) -> None:
        projector = heads.SwaVProjectionHead(encoder.dim, _HIDDEN, _PROJECTION)
        super().__init__(encoder, _UnitPrototypes(projector, _PROTOTYPES), SwaVLoss())

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion([self.projector(self.encoder(first)), self.projector(self.encoder(second))], [])
        return loss.squeeze()


def _keep(bank: MemoryBankModule) -> None:
    """Make a memory bank part of the checkpoint; lightly leaves it out, and a resumed run would start with an empty one."""
    bank.register_buffer("bank", bank.bank, persistent=True)
    bank.register_buffer("bank_ptr", bank.bank_ptr, persistent=True)


def supcon_loss(vectors: Tensor, labels: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """Supervised contrastive loss of vectors [N, d] with labels [N]; every label must occur at least twice."""
    unit = F.normalize(vectors, dim=1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    log_share = logits - logits.logsumexp(dim=1, keepdim=True)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    return -(log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def _method(name: SSLMethod, encoder: Encoder, images: int, classes: int) -> _Method:
    if name == "supervised":
        return _Supervised(encoder, classes)
    dim = encoder.dim
    # A queue as long as the data would hold every image's own earlier views as its negatives.
    queue = max(1, min(_QUEUE, images // 2))
    if name == "simclr":
        projector = heads.SimCLRProjectionHead(dim, _HIDDEN, _PROJECTION)
        return _Joint(encoder, projector, NTXentLoss(temperature=_TEMPERATURE))
    if name == "vicreg":
        return _Joint(encoder, heads.VICRegProjectionHead(dim, _HIDDEN, _HIDDEN), VICRegLoss())
    if name == "barlowtwins":
        return _Joint(encoder, heads.BarlowTwinsProjectionHead(dim, _HIDDEN, _HIDDEN), BarlowTwinsLoss())
    if name == "moco":
        return _MoCo(encoder, queue)
    if name == "nnclr":
        return _NNCLR(encoder, queue)
    if name == "byol":
        return _BYOL(encoder)
    return _SwAV(encoder) if name == "swav" else _SupCon(encoder)


def views(height: int, width: int) -> nn.Module:
    """SimCLR's random views (Chen et al. 2020, appendix A): images [N, 3, H, W] in [0, 1] -> the same, each on its own.

    The blur is left out up to 64 pixels, as is usual for small images.
    """
    steps = [
        augmentation.RandomResizedCrop((height, width), scale=(0.08, 1.0), cropping_mode="resample"),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
    ]
    if max(height, width) > 64:
        kernel = max(height, width) // 10 | 1
        steps.append(augmentation.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5))
    return nn.Sequential(*steps)


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

    RecipeError where a method that needs labels meets images without them.
    """
    done = folder / f"{job}.pt"
    encoder = copy.deepcopy(encoder)
    if done.exists():
        saved = load_tensors(done)
        encoder.load_state_dict(saved["encoder"])
        return encoder.eval(), saved["history"]
    if recipe.method in ("supcon", "supervised") and (labels < 0).any():
        raise RecipeError(f"{job}: {recipe.method} needs labelled images, train/<class>/*")

    torch.manual_seed(seed)
    method = _method(recipe.method, encoder, len(images), int(labels.max()) + 1).to(device).train()
    augmented = views(*images.shape[1:3])

    def view(x: Tensor) -> Tensor:
        # In the memory format that convolutions like.
        found: Tensor = augmented(x).contiguous(memory_format=torch.channels_last)
        return found

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
                x = as_input(images[chosen], device)
                first = view(x)
                second = view(x) if method.compares else first
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
