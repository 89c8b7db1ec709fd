"""Noise that is drawn again, the same, when activation checkpointing runs a call a second time.

`torch.utils.checkpoint` restores the global generators and no others, and a draw from a global one
would change with every other part that draws. So each draw has a generator of its own, seeded by
the call's ctx.seed and the number of the draw.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor

from moetk.context import RouterContext


def generator(ctx: RouterContext, device: torch.device, draw: int = 0) -> torch.Generator:
    """A generator on `device` that only (ctx.seed, draw) decides.

    Raises MissingContextError when ctx.seed is None.
    """
    seed = int(cast(Any, ctx.require("seed")))
    # The CPU generator reads only 32 bits of its seed: hash, so that every bit of ours counts.
    digest = hashlib.sha256(f"{seed}/{draw}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


def normal_like(t: Tensor, ctx: RouterContext, draw: int = 0) -> Tensor:
    """Standard normal noise in the shape, dtype and device of t. A second draw of one call: draw=1.

    Raises MissingContextError when ctx.seed is None.
    """
    return torch.randn(
        t.shape, dtype=t.dtype, device=t.device, generator=generator(ctx, t.device, draw)
    )


def jitter(x_TH: Tensor, eps: float, ctx: RouterContext, draw: int = 0) -> Tensor:
    """x_TH times uniform noise in [1 - eps, 1 + eps), a new tensor (arXiv 2101.03961).

    In float32 or wider: around 1 bfloat16 has steps of 0.4% to 0.8%, too coarse for an eps of 0.01.
    Raises MissingContextError when ctx.seed is None.
    """
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    noise_TH = torch.rand(
        x_TH.shape, dtype=dtype, device=x_TH.device, generator=generator(ctx, x_TH.device, draw)
    )
    return x_TH * (1 - eps + 2 * eps * noise_TH)
