"""How much of everything an evaluation does: `smoke` in a minute (tests), `small` on two cores, `full` on an accelerator."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """Numbers of images, steps and epochs."""

    images: int
    """Test images of each task, which are attacked."""
    clean: int
    """Test images for the accuracy and the false alarms without an attack, those above among them: they cost little each."""
    fit: int
    """Clean training images of a task for its heads, and as many at most for its own calibration."""
    surrogate: int
    """The attacker's own images, for universal perturbations."""
    pgd_steps: int
    restarts: int
    uap_epochs: int
    generator_epochs: int
    iterations: int
    """Of PAP and SSP."""
    adaptive_images: int
    adaptive_steps: int
    adaptive_restarts: int
    """Starts of each search of the adaptive suite; the first is near the image, the second anywhere in the ball."""

    def effort(self, share: float) -> Size:
        """The same attacks on the public victim with a share of their steps, at least one."""
        efforts = ("pgd_steps", "uap_epochs", "generator_epochs", "iterations")
        return replace(self, **{name: max(1, round(share * getattr(self, name))) for name in efforts})


SIZES = {
    "smoke": Size(
        images=40, clean=60, fit=200, surrogate=64, pgd_steps=5, restarts=1, uap_epochs=1, generator_epochs=1, iterations=4,
        adaptive_images=16, adaptive_steps=5, adaptive_restarts=1,
    ),
    "small": Size(
        images=300, clean=2000, fit=3000, surrogate=1000, pgd_steps=20, restarts=2, uap_epochs=5, generator_epochs=10,
        iterations=1000, adaptive_images=100, adaptive_steps=40, adaptive_restarts=1,
    ),
    "full": Size(
        images=1000, clean=10000, fit=10000, surrogate=10000, pgd_steps=50, restarts=5, uap_epochs=10, generator_epochs=20,
        iterations=2000, adaptive_images=1000, adaptive_steps=200, adaptive_restarts=2,
    ),
}  # fmt: skip
