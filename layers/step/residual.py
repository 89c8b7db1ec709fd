"""Residual streams: each sum together with the norm behind it, each stream's gradient together with
that of the norm beside it.

The sum at the end of a layer stays apart from the norm that begins the next. Joined, one would have
to hand the other a tensor that nobody else may see, and whatever reads, skips, checkpoints or
reorders layers would see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moetk.kernels.norm import added_rms_norm, forked_rms_norm
from moetk.layers.find import runs_on
from moetk.layers.step.joined import Joined, joined
from moetk.layers.step.norm import NORMS, NormShell, rule_of, why_stock
from moetk.layers.step.part import ACTIVE, Part, is_watched
from moetk.layers.step.under import stock_class
from moetk.layers.swap import own_class


class ResidualShell:
    """In front of a decoder layer: runs its own forward, rewritten by `joined`. Whether a line's
    kernel can take the tensors is seen when they are there; the line says what it said, if not."""

    _moetk_stock: Any  # the class it is in front of
    _moetk_joined: Joined

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_moetk_joined"):
            cls._moetk_stock = cls.__bases__[1]
            cls._moetk_joined = joined(cls._moetk_stock.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if ACTIVE not in vars(self) or self._moetk_outdated():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._moetk_joined.forward(self, *args, **kwargs)

    def _moetk_outdated(self) -> bool:
        """Somebody has given the class another forward since this one was read."""
        return self._moetk_stock.forward is not self._moetk_joined.read

    def _moetk_forked(self, stream: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        if _why_apart(norm, stream.dtype) is not None:
            return stream, norm(stream)
        return forked_rms_norm(stream, norm.weight, **rule_of(norm))

    def _moetk_added(self, stream: Tensor, branch: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        alike = stream.dtype == branch.dtype and stream.shape == branch.shape
        if not alike or _why_apart(norm, stream.dtype) is not None:
            return self._moetk_forked(stream + branch, norm)
        return added_rms_norm(stream, branch, norm.weight, **rule_of(norm))


def _why_apart(norm: Any, dtype: torch.dtype | None = None) -> str | None:
    """Why a norm is called as a module and what stands beside it is left to torch, or None.

    dtype: the stream's; None = that of the norm's weight.
    """
    if not isinstance(norm, NormShell) or ACTIVE not in vars(norm):
        return "is left stock"
    if is_watched(norm):  # type: ignore[arg-type]
        return "is hooked and must be called"
    weight: Tensor = norm.weight  # type: ignore[attr-defined]
    return why_stock(dtype or weight.dtype, weight.dtype)


def _concerns(module: nn.Module) -> bool:
    cls = own_class(module)
    return cls.__name__.endswith("DecoderLayer") and cls.__module__.startswith(
        "transformers.models."
    )


def _refusal(module: nn.Module) -> str | None:
    found = joined(stock_class(module).forward)
    if found.why_not is not None:
        return found.why_not
    names = {own_class(getattr(module, name)).__name__ for name in found.added + found.forked}
    if not names & NORMS.keys():
        return f"{', '.join(sorted(names))} has no row in moetk.layers.step.norm"
    return None


def _runs(module: nn.Module) -> str:
    shell: Any = module
    if shell._moetk_outdated():
        return "stock: its class was given another forward"
    found: Joined = shell._moetk_joined
    joins, apart = [], []
    for name in found.forked + found.added:
        why = _why_apart(getattr(module, name))
        beside = "the sum before it" if name in found.added else "the stream beside it"
        if why is None:
            joins.append(f"{name} and {beside}")
        else:
            apart.append(f"{name} {why}")
    if not found.added:
        apart.append("no sum before a norm is plain")
    how = "one Triton kernel each way" if runs_on(module).type == "cuda" else "plain torch"
    ours = [f"moetk, {how}: {', '.join(joins)}"] if joins else []
    stock = [f"stock: {', '.join(apart)}"] if apart else []
    return "; ".join(ours + stock)


RESIDUAL = Part("residual", ResidualShell, _concerns, _refusal, _runs)
