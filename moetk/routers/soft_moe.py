from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moetk.context import RouterContext
from moetk.errors import MoeShapeError, ReplayError
from moetk.kernels.counting import mask_of
from moetk.kernels.selection import sequences
from moetk.routing import SoftChoice
from moetk.settings import check_whole


class SoftMoERouter(nn.Module):
    """Every slot is a mixture of all tokens of a sequence, every token of all slots.
    arXiv 2308.00951, algorithm 1, tokens and phi normalised, with one learned scale

    slots: of one expert. Padding (ctx.token_mask) is mixed into no slot. Not causal.
    Raises MissingContextError for a packed batch, where one sequence would leak into another, and
    ReplayError under a replay: nothing is chosen here.
    """

    def __init__(self, hidden_size: int, num_experts: int, slots: int = 1) -> None:
        super().__init__()
        check_whole(
            type(self).__name__, hidden_size=hidden_size, num_experts=num_experts, slots=slots
        )
        self.num_experts, self.slots = num_experts, slots
        self.phi_PH = nn.Parameter(torch.randn(num_experts * slots, hidden_size))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> SoftChoice:
        if ctx.replay is not None:
            raise ReplayError(
                f"SoftMoERouter chooses nothing, so ctx.replay {tuple(ctx.replay.shape)} cannot be "
                "followed. Replay into a token-choice router."
            )
        ctx.require("batch_shape", self)
        if x_TH.ndim != 2 or x_TH.shape[1] != self.phi_PH.shape[1]:
            raise MoeShapeError(
                f"SoftMoERouter: x_TH is {tuple(x_TH.shape)}, expected "
                f"(T, H={self.phi_PH.shape[1]})."
            )
        batch, length = sequences(ctx, len(x_TH))
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        x_BSH = normalize(x_TH.to(dtype), dim=-1).view(batch, length, x_TH.shape[1])
        logits_BSP = x_BSH @ (self.scale * normalize(self.phi_PH.to(dtype), dim=-1)).T
        dispatch_BSP = _softmax_over_tokens(logits_BSP, mask_of(ctx, len(x_TH)))
        return SoftChoice(dispatch_BSP, logits_BSP.softmax(2), self.num_experts)


def _softmax_over_tokens(logits_BSP: Tensor, token_mask_T: Tensor | None) -> Tensor:
    if token_mask_T is None:
        return logits_BSP.softmax(1)
    padding_BS1 = ~token_mask_T.view(*logits_BSP.shape[:2], 1)
    lowest = torch.finfo(logits_BSP.dtype).min  # finite: a sequence of padding is 0, not NaN
    return logits_BSP.masked_fill(padding_BS1, lowest).softmax(1).masked_fill(padding_BS1, 0)
