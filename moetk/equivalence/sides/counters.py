"""What a layer that counts its experts' tokens has counted after one training step.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetk.equivalence.double import still_in_double
from moetk.equivalence.sides.loads import is_load
from moetk.equivalence.sides.untouched import copied, plain_tensors

Forward = Callable[[nn.Module, Tensor], Tensor]


def gained_by_counter(
    module: nn.Module,
    forward: Forward,
    x_TH: Tensor,
    known: Sequence[Tensor],
    ignore: Sequence[Tensor] = (),
) -> Tensor | None:
    """(E,) int64: what a counter of the module's gains in one training step under activation
    checkpointing, which runs the forward twice. None where nothing counts.

    A counter is a buffer or attribute of shape (E,), whatever its name, that the step moves by one
    of the known counts of the choices, or a multiple: steps since an expert was last used are whole
    numbers too. ignore: tensors that are none. The module is not changed: a copy is trained.
    """
    num_experts = len(known[0])
    if not _held(module, num_experts, ignore):
        return None
    ignored = [_path(module, tensor) for tensor in ignore]
    module = copied(module)
    module.train()
    held = [t for t in _held(module, num_experts) if _path(module, t) not in ignored]
    before = [(path, t.clone()) for t in held if (path := _path(module, t)) is not None]
    step(module, forward, x_TH)
    moved = [path for path, old in before if not torch.equal(_at(module, path), old)]
    with torch.no_grad():
        for path in moved:
            # From zero: what is written anew at each forward, and what is added up, read alike.
            _at(module, path).zero_()
    step(module, forward, x_TH)
    for path in moved:
        gained_E = _at(module, path).detach().double()
        if torch.equal(gained_E, gained_E.round()) and is_load(gained_E.long(), known):
            return gained_E.long()
    return None


def step(module: nn.Module, forward: Forward, x_TH: Tensor) -> None:
    """Forward and backward with the forward run again in backward."""

    def squared(x_TH: Tensor) -> Tensor:
        # The square needs the output: recomputing stops at the last tensor that backward needs,
        # and in a model that is behind this layer.
        output: Tensor = forward(module, x_TH).square()
        return output

    x_TH = x_TH.detach().clone().requires_grad_()
    # Backward leaves every TorchFunctionMode: the forward would run again in other dtypes.
    recompute = still_in_double()
    with torch.enable_grad():
        output_TH = checkpoint(
            squared, x_TH, use_reentrant=False, context_fn=lambda: (nullcontext(), recompute)
        )
        torch.autograd.backward(output_TH.float().sum())


def committed(attachment: Any, run: Callable[[], None]) -> Tensor | None:
    """(E,): what the first controller that sums one vector was given in `run`; None = there is no
    such controller."""
    for one in attachment.steered:
        one.take()
    run()
    for one in attachment.steered:
        if one.controller.accumulate == "sum" and len(one.totals) == 1 and one.totals[0].ndim == 1:
            return one.totals[0].detach().clone()  # type: ignore[no-any-return]
    return None


def _held(module: nn.Module, num_experts: int, ignore: Sequence[Any] = ()) -> list[Tensor]:
    skip = {id(tensor) for tensor in ignore}
    return [
        tensor
        for one in module.modules()
        for tensor in plain_tensors(one)
        if tuple(tensor.shape) == (num_experts,) and id(tensor) not in skip
    ]


_Path = tuple[str, str]


def _path(module: nn.Module, tensor: Tensor) -> _Path | None:
    for name, one in module.named_modules():
        for held in (one._buffers, vars(one)):
            for key, value in held.items():
                if value is tensor:
                    return name, key
    return None


def _at(module: nn.Module, path: _Path) -> Tensor:
    value: Tensor = getattr(module.get_submodule(path[0]), path[1])
    return value
