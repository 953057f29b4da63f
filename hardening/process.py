"""What every process that trains or measures does first."""

from __future__ import annotations

import ctypes
import sys

import torch

from model_store.errors import TwogateError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


class DeviceError(TwogateError):
    """There is no such device."""


def check_device(device: str) -> None:
    """DeviceError where torch has no such device here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise DeviceError(f"there is no device {device!r} here; use --device cpu") from None


def prepare_process() -> None:
    """Keep freed memory in the process, and compute convolutions exactly on an accelerator too.

    Asking the kernel for memory again, tensor by tensor, slows training on a CPU; glibc is told to serve large tensors from
    its heap and not to give the heap back. NVIDIA's TF32 has ten bits of mantissa: calibration and measurement would not be
    those of the graph that is served. `run_epochs` allows it for training, which does not mind.
    """
    torch.backends.cudnn.allow_tf32 = False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
