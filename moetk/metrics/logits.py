"""How large the router's logits are: they grow before a training run diverges.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.metrics.choices import unmasked_tokens
from moetk.routing import Routing, need


def logit_rms(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """Root mean square of logits_TE over unmasked tokens, fp32; 0 without tokens.

    Raises MissingFieldError without logits_TE.
    """
    logits_TE = need(routing, "logits_TE", "logit_rms").detach().float()
    squares_T = logits_TE.square().mean(-1)
    unmasked_T = unmasked_tokens(routing, ctx)
    if unmasked_T is None:
        return (squares_T.sum() / max(squares_T.shape[0], 1)).sqrt()
    return (torch.where(unmasked_T, squares_T, 0).sum() / unmasked_T.sum().clamp(min=1)).sqrt()


def logit_max(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """Largest magnitude in logits_TE over unmasked tokens, fp32; 0 without tokens.

    Raises MissingFieldError without logits_TE.
    """
    logits_TE = need(routing, "logits_TE", "logit_max").detach().float().abs()
    unmasked_T = unmasked_tokens(routing, ctx)
    if unmasked_T is not None:
        logits_TE = torch.where(unmasked_T[:, None], logits_TE, 0)
    return logits_TE.max() if logits_TE.numel() else logits_TE.new_zeros(())
