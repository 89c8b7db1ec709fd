"""Loss-free balancing: a bias that moves each choice towards the experts with too little work.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import (
    MissingTensorError,
    MoeShapeError,
    RouterConfigError,
    UnexpectedTensorError,
    UnsupportedRoutingError,
)
from moetk.kernels.counting import count_choices, mask_of
from moetk.routing import Routing, TokenChoice
from moetk.settings import check_number

BUFFER = "e_score_correction_bias"


class BiasUpdate:
    """Once an optimizer step: bias_e += rate * sign(mean choices - choices of e).

    Choices are counted over the unmasked tokens, before capacity, and summed over micro-batches and
    ranks before `step` sees them. arXiv 2408.15664, algorithm 1 (rate 1e-3); `centred` takes the
    mean off the update, which keeps the sum of the bias (torchtitan, models/common/moe.py).

    rate: a number, or a function from the steps already made to one (DeepSeek-V3: 1e-3, then 0 for
        the last tokens).

    The bias itself is kept in fp32, and the router's `e_score_correction_bias`, of any dtype, is
    written from it: in bfloat16 0.5 + 1e-3 is 0.5, and a bias kept there would never move again.
    Whoever wrote the router's buffer last is right: where it holds something else than what this
    controller wrote (a checkpoint was loaded), the bias goes on from there.

    A copy of a whole model has controllers bound to the copied routers; a copy of a controller
    alone is bound to none.

    Raises RouterConfigError for a rate that is no finite number >= 0; when bound to a router
    without a bias that it may move; when used before it is bound.
    """

    accumulate = "sum"

    def __init__(self, rate: float | Callable[[int], float], *, centred: bool = False) -> None:
        if not callable(rate):
            check_number("BiasUpdate", "rate", rate, least=0)
        self.rate = rate
        self.centred = centred
        self._router: Any = None
        self._bias_E: Tensor | None = None  # fp32, before it is rounded to the router's dtype
        self._steps = 0

    def __repr__(self) -> str:
        return f"BiasUpdate({self.rate}, centred={self.centred})"

    def bind(self, router: Any) -> None:
        """Move this router's bias from now on."""
        bias_E = getattr(router, BUFFER, None)
        if not isinstance(bias_E, Tensor):
            raise RouterConfigError(
                f"BiasUpdate moves {BUFFER}, which {type(router).__name__} does not have. Give it "
                f"a router with a buffer of that name, (E,), added to the scores for the choice."
            )
        if bias_E.requires_grad:
            raise RouterConfigError(
                f"BiasUpdate moves {BUFFER}, but in {type(router).__name__} it is a parameter that "
                "the optimizer moves too. Make it a buffer, or freeze it."
            )
        self._router = router

    def observe(self, routing: Routing, ctx: RouterContext) -> Tensor:
        """(E,) int64: how many choices of unmasked tokens name each expert, dropped ones too.

        Raises UnsupportedRoutingError unless tokens choose, MoeShapeError when ctx.token_mask is
        not (T,).
        """
        if not isinstance(routing, TokenChoice):
            raise UnsupportedRoutingError(
                f"BiasUpdate counts what tokens chose, and this {type(routing).__name__} is "
                "balanced by construction. Leave the controller out."
            )
        unmasked_T = mask_of(ctx, routing.experts_TK.shape[0])
        return count_choices(routing.experts_TK, routing.num_experts, unmasked_T)[0]

    @torch.no_grad()
    def step(self, observed: Tensor) -> None:
        """Move the bias by the counts (E,) of one optimizer step; all zero = it stays.

        Raises MoeShapeError when there are not E counts, RouterConfigError when a rate that is a
        function returns no finite number >= 0; nothing is changed then.
        """
        buffer_E, bias_E = self._buffer(), self._followed()
        if observed.shape != bias_E.shape:
            raise MoeShapeError(
                f"BiasUpdate.step got counts {tuple(observed.shape)}, the bias is "
                f"{tuple(bias_E.shape)}: one count an expert."
            )
        rate = self.rate
        if callable(rate):
            rate = rate(self._steps)
            # A NaN would stay in the bias for good.
            check_number("BiasUpdate", f"rate({self._steps})", rate, least=0)
        counts_E = observed.to(bias_E.device)
        # The sign of mean - count without the division: exact in integers, where a mean may round.
        update_E = rate * (counts_E.sum() - counts_E.numel() * counts_E).sign().to(bias_E)
        if self.centred:
            update_E = update_E - update_E.mean()
        self._bias_E = bias_E + update_E
        self._steps += 1
        buffer_E.copy_(self._bias_E)

    def state_dict(self) -> dict[str, Tensor]:
        """bias: (E,) fp32. steps: () int64."""
        return {"bias": self._followed().clone(), "steps": torch.tensor(self._steps)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, and write the router's buffer from it.

        Raises MissingTensorError, UnexpectedTensorError, MoeShapeError; nothing is changed then.
        """
        names = {"bias", "steps"}
        if missing := names - state.keys():
            raise MissingTensorError(f"BiasUpdate: the state lacks {', '.join(sorted(missing))}.")
        if extra := state.keys() - names:
            raise UnexpectedTensorError(
                f"BiasUpdate: the state has {', '.join(sorted(extra))}; it holds bias and steps."
            )
        buffer_E, bias_E = self._buffer(), state["bias"]
        if bias_E.shape != buffer_E.shape:
            raise MoeShapeError(
                f"BiasUpdate: the state's bias is {tuple(bias_E.shape)}, the router's "
                f"{tuple(buffer_E.shape)}: it was saved with another number of experts."
            )
        self._bias_E = bias_E.detach().to(buffer_E.device, torch.float32, copy=True)
        self._steps = int(state["steps"])
        buffer_E.copy_(self._bias_E)

    def _buffer(self) -> Tensor:
        # Looked up each time: `.to()` and sharding put another tensor in its place.
        if self._router is None:
            raise RouterConfigError(
                "BiasUpdate is not bound to a router. Pass it to a layer or to replace_moe, or "
                "call bind(router)."
            )
        buffer_E: Tensor = getattr(self._router, BUFFER)
        return buffer_E

    def _followed(self) -> Tensor:
        """The fp32 bias, with the buffer's own values wherever someone else has written it."""
        buffer_E = self._buffer().detach()
        if self._bias_E is None:
            return buffer_E.float().clone()
        bias_E = self._bias_E.to(buffer_E.device)
        return torch.where(bias_E.to(buffer_E.dtype) == buffer_E, bias_E, buffer_E.float())

    def __deepcopy__(self, memo: dict[int, Any]) -> BiasUpdate:
        new = copy.copy(self)
        memo[id(self)] = new
        # A router that is being copied in the same sweep is in the memo by now; any other is not
        # ours to copy, and two controllers must not move one bias.
        new._router = memo.get(id(self._router))
        new._bias_E = None if self._bias_E is None else self._bias_E.clone()
        return new
