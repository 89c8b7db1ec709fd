"""Where these tests run: on CUDA, where the kernels are what is tested, or (MOETK_TEST_DEVICE=cpu)
on the kernels' plain twins, a dry run that tests the tests."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("MOETK_TEST_DEVICE", "cuda"))
KERNELS = DEVICE.type == "cuda"
EXAMPLES = int(os.environ.get("MOETK_TEST_EXAMPLES", "20"))
"""Drawn cases of each law."""

needs_kernels = pytest.mark.skipif(not KERNELS, reason="asks the device what no twin answers")


def why_not() -> str | None:
    """Why the tests cannot run here, None where they can."""
    if not KERNELS:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device; MOETK_TEST_DEVICE=cpu runs the kernels' twins"
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return None if major >= 9 else f"compute capability {major}.{minor}; the kernels need 9.0"


def normal(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0
) -> torch.Tensor:
    """Drawn on the device, where a bank of real size takes no time."""
    source = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=source, device=DEVICE) * std).to(dtype)
