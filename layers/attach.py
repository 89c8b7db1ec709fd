"""Losses and controllers act through an identity on the layer's output.

Its backward runs once for every forward whose output is differentiated: not for no_grad passes,
not twice under recompute, three times for a layer tied three times. There it adds the losses'
gradient and commits what the controllers observed. Counting in forward is wrong in four of seven
such cases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import AuxScaleError, MoeShapeError, RouterConfigError, TopologyError
from moetk.layers.carrier import LossGradient, ModelForward
from moetk.routing import Routing, keep_fields

Reduce = Callable[[Tensor], Tensor]


class Loss(Protocol):
    """`reads` names the optional routing fields it needs; the result is a fp32 scalar."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    def __call__(self, routing: Any, ctx: RouterContext) -> Tensor: ...


class Controller(Protocol):
    """Observes every routing, moves once an optimizer step."""

    accumulate: str

    def observe(self, routing: Any, ctx: RouterContext) -> Any: ...
    def step(self, observed: Any) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Steered:
    """One layer's copy of a controller, and what has been observed since its last step."""

    def __init__(self, controller: Controller, router: Any, where: str) -> None:
        self.controller = copy.deepcopy(controller)
        if self.controller.accumulate not in ("sum", "cat"):
            raise RouterConfigError(
                f"{type(controller).__name__}.accumulate = {controller.accumulate!r}; it is "
                '"sum" or "cat".'
            )
        bind = getattr(self.controller, "bind", None)
        if bind is not None:
            try:
                bind(router)
            except RouterConfigError as error:
                raise RouterConfigError(f"{where}: {error}") from error
        self._router = router
        # Plain tensors, never buffers: DDP overwrites buffers with rank 0's.
        self.totals: list[Tensor] = []
        self._parts: list[list[Tensor]] = []
        self._single = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Steered:
        # The router first, so that the controller's copy finds it: where a family's experts come
        # before its gate, this object is reached before the router is.
        copy.deepcopy(self._router, memo)
        if id(self) not in memo:
            new = memo[id(self)] = copy.copy(self)
            new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return memo[id(self)]  # type: ignore[no-any-return]

    def observe(self, routing: Routing, ctx: RouterContext) -> tuple[Tensor, ...]:
        observed = self.controller.observe(routing, ctx)
        self._single = isinstance(observed, Tensor)
        values = (observed,) if isinstance(observed, Tensor) else tuple(observed)
        if self.controller.accumulate == "sum" and not self.totals:
            self.totals = [torch.zeros_like(value) for value in values]
        return values

    def commit(self, observed: Sequence[Tensor]) -> None:
        if self.controller.accumulate == "cat":
            self._parts.append(list(observed))
        else:
            for total, value in zip(self.totals, observed, strict=True):
                total.add_(value)

    def take(self) -> list[Tensor] | None:
        """What has accumulated, and start anew; None when nothing was ever observed."""
        if self.controller.accumulate == "cat":
            parts, self._parts = self._parts, []
            return [torch.cat(column) for column in zip(*parts, strict=True)] or None
        taken = [total.clone() for total in self.totals]
        for total in self.totals:
            total.zero_()
        return taken or None

    def step(self, observed: list[Tensor]) -> None:
        self.controller.step(observed[0] if self._single else tuple(observed))


def step_all(steered: Sequence[Steered], reduce: Reduce | None) -> None:
    """Reduce every layer's observations over the ranks in one call, then move the controllers.

    Raises TopologyError on more than one rank without `reduce`.
    """
    _check_reduce(reduce)
    taken = [(one, observed) for one in steered if (observed := one.take()) is not None]
    if reduce is not None:
        sums = [t for one, obs in taken if one.controller.accumulate == "sum" for t in obs]
        if sums:
            # fp64: counts of a long step pass 2^24, where fp32 stops counting.
            flat = reduce(torch.cat([t.flatten().double() for t in sums]))
            for tensor, part in zip(sums, flat.split([t.numel() for t in sums]), strict=True):
                tensor.copy_(part.view_as(tensor))
    for one, observed in taken:
        if reduce is not None and one.controller.accumulate == "cat":
            gather = getattr(reduce, "gather", None)
            if gather is None:
                raise TopologyError(
                    f"{type(one.controller).__name__} accumulates by concatenation; its reduce "
                    "needs a `gather` (moetk.parallel.SumOverRanks has one)."
                )
            observed = [gather(tensor) for tensor in observed]
        one.step(observed)


def _check_reduce(reduce: Reduce | None) -> None:
    world = (
        torch.distributed.get_world_size()
        if torch.distributed.is_available() and torch.distributed.is_initialized()
        else 1
    )
    if world > 1 and reduce is None:
        raise TopologyError(
            f"{world} ranks, and the controllers were not told how to sum their counts: each rank "
            "would move its own bias. Pass reduce=moetk.parallel.sum_over_ranks."
        )


class Attachment:
    """The losses and controllers of one layer, and the scale their gradient enters with."""

    def __init__(
        self,
        losses: Sequence[Loss],
        controllers: Sequence[Controller],
        router: Any,
        aux_scale: float | Callable[[], float | Tensor] | None,
        where: str,
    ) -> None:
        self.losses = tuple(losses)
        self.steered = tuple(Steered(controller, router, where) for controller in controllers)
        self.aux_scale = aux_scale
        self.where = where
        # None = keep every field: a part that does not say what it reads may read anything.
        said = [getattr(part, "reads", None) for part in (*self.losses, *controllers)]
        self.reads: frozenset[str] | None = None
        if None not in said:
            self.reads = frozenset(name for reads in said for name in reads or ())

    def __bool__(self) -> bool:
        return bool(self.losses or self.steered)

    def __call__(
        self, y_TH: Tensor, routing: Routing, ctx: RouterContext, forward: ModelForward | None
    ) -> Tensor:
        """y_TH unchanged, with the losses and counts hanging on its gradient."""
        if not torch.is_grad_enabled() or not y_TH.requires_grad:
            return y_TH
        if self.reads is not None:
            routing = keep_fields(routing, self.reads)
        total = torch.zeros((), device=y_TH.device)
        for loss in self.losses:
            value = loss(routing, ctx)
            if not isinstance(value, Tensor) or value.ndim:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise MoeShapeError(
                    f"{name_of(loss)} in {self.where} returned {got}; a loss returns a scalar "
                    "tensor."
                )
            total = total + value
        with torch.no_grad():
            observed = [one.observe(routing, ctx) for one in self.steered]
        arrival = None if forward is None else forward.loss
        scale = None if arrival is None else arrival.scale
        widths = tuple(len(values) for values in observed)
        y: Tensor = _Inject.apply(
            y_TH, total, scale, self, arrival, widths, *(t for values in observed for t in values)
        )
        return y

    def scale(self, scale: Tensor | None, arrival: LossGradient | None) -> Tensor | float:
        if self.aux_scale is not None:
            return self.aux_scale() if callable(self.aux_scale) else self.aux_scale
        arrived = arrival is not None and arrival.arrived
        if scale is not None and (torch.compiler.is_compiling() or arrived):
            return scale
        raise AuxScaleError(
            f"{self.where}: a gradient reached this layer before one reached out.loss, so the "
            "scale of its attached losses is unknown: the loss is computed outside the model. "
            "Call the model with labels=..., or pass aux_scale= to replace_moe (the gradient of "
            "your loss's weight, 1.0 for a plain mean over the micro-batch)."
        )


def name_of(part: Any) -> str:
    """What a part is called in messages: a function by its own name, an object by its class's."""
    return getattr(part, "__qualname__", None) or type(part).__qualname__


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        total: Tensor,
        scale: Tensor | None,
        attachment: Attachment,
        arrival: LossGradient | None,
        widths: tuple[int, ...],
        *observed: Tensor,
    ) -> Tensor:
        ctx.scale, ctx.attachment, ctx.arrival = scale, attachment, arrival
        ctx.widths = widths
        ctx.save_for_backward(*observed)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        attachment: Attachment = ctx.attachment
        observed = ctx.saved_tensors
        if torch.compiler.is_compiling() or not getattr(ctx, "committed", False):
            # Once a forward, however often its graph is walked (retain_graph, autograd.grad).
            ctx.committed = True
            start = 0
            for one, width in zip(attachment.steered, ctx.widths, strict=True):
                one.commit(observed[start : start + width])
                start += width
        injected = None
        if attachment.losses:
            scale = attachment.scale(ctx.scale, ctx.arrival)
            if isinstance(scale, Tensor):
                injected = scale.to(grad.device, torch.float32)
            else:  # full, not as_tensor: no copy that the device waits for
                injected = torch.full((), scale, dtype=torch.float32, device=grad.device)
        return (grad, injected, None, None, None, None, *(None for _ in observed))
