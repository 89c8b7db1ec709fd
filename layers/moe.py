"""A mixture-of-experts layer from parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.dispatch import Dispatcher, Local, with_drops
from moetk.errors import RouterConfigError
from moetk.layers.attach import Attachment, Controller, Loss, Reduce, name_of, step_all
from moetk.recorded import check_obeyed
from moetk.routing import Routing, check_routing


class MoELayer(nn.Module):
    """Route, dispatch, compute, combine. Returns the output and the routing, always both.

    >>> layer = MoELayer(MixtralRouter(64, 8, 2), ExpertBank(64, 8, 128),
    ...                  losses=[LoadBalancingLoss(0.01)])
    >>> y, routing = layer(torch.randn(4, 16, 64))
    >>> y.shape, routing.experts_TK.shape
    (torch.Size([4, 16, 64]), torch.Size([64, 2]))

    The routing is the router's, with what the dispatcher then dropped in kept_TK.
    Losses need no adding up: in training each one's gradient enters in backward, at its own
    coefficient times aux_scale. Controllers are copied and bound to this layer's router; `step`
    moves them.

    router: any callable (x_TH, ctx) -> Routing. experts: (x_TH, routing) -> y_TH.
    shared_experts: (x_TH) -> y_TH, added. dispatcher: None = Local().
    check: look at routing values on every call: None = on the CPU, True = always, False = never.
    """

    def __init__(
        self,
        router: Callable[[Tensor, RouterContext], Routing],
        experts: nn.Module,
        *,
        shared_experts: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
        losses: Sequence[Loss] = (),
        controllers: Sequence[Controller] = (),
        aux_scale: float | Callable[[], float | Tensor] = 1.0,
        check: bool | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.dispatcher = Local() if dispatcher is None else dispatcher
        self.check = check
        self.attachment = Attachment(losses, controllers, router, aux_scale, "MoELayer")

    def forward(self, x: Tensor, ctx: RouterContext | None = None) -> tuple[Tensor, Routing]:
        """x (..., H) -> (same shape, Routing over the flattened T)."""
        x_TH = x.flatten(0, -2)
        if ctx is None:
            ctx = RouterContext(batch_shape=(x.shape[0], x.shape[1]) if x.ndim == 3 else None)
        routing = self.router(x_TH, ctx)
        check_routing(
            routing,
            len(x_TH),
            getattr(self.experts, "num_experts", 0),
            where=name_of(self.router),
            duplicates=getattr(self.router, "duplicates", False),
            values=self.check,
            batch_shape=ctx.batch_shape,
        )
        check_obeyed(routing, ctx, name_of(self.router))
        x_RH, local, handle = self.dispatcher.dispatch(x_TH, routing, ctx)
        y_TH = self.dispatcher.combine(self.experts(x_RH, local), handle)
        if self.attachment and self.training:
            y_TH = self.attachment(y_TH, routing, ctx, None)
        if self.shared_experts is not None:
            y_TH = y_TH + self.shared_experts(x_TH)
        return y_TH.view_as(x), with_drops(routing, local)

    def controller_state(self) -> list[dict[str, Any]]:
        """The controllers' states, in their order; with the parameters' state_dict, what a resume
        needs."""
        return [one.controller.state_dict() for one in self.attachment.steered]

    def load_controller_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume exactly. Raises RouterConfigError when their number differs."""
        if len(states) != len(self.attachment.steered):
            raise RouterConfigError(
                f"{len(states)} controller states for {len(self.attachment.steered)} controllers."
            )
        for one, state in zip(self.attachment.steered, states, strict=True):
            one.controller.load_state_dict(state)

    def step(self, reduce: Reduce | None = None) -> None:
        """Move the controllers by what backward has committed since the last step."""
        step_all(self.attachment.steered, reduce)

    def step_after(self, optimizer: torch.optim.Optimizer, reduce: Reduce | None = None) -> Any:
        """Call `step` after every step of the optimizer. Returns the hook's handle."""
        return optimizer.register_step_post_hook(lambda *_: self.step(reduce))
