"""Code under comparison may draw random numbers; the caller's are not used up."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def same_chance(x: Tensor) -> AbstractContextManager[None]:
    """Within it, torch's generators (the CPU's, and that of x's device) start from where they are
    and end there, so that each run draws the same numbers."""
    devices = [] if x.device.type == "cpu" else [x.device]
    return torch.random.fork_rng(devices, device_type=x.device.type)
