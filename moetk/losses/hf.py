"""The auxiliary loss of Transformers' own models, from recorded routings, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetk.errors import MissingFieldError, MoeShapeError
from moetk.losses.counted import as_token_choice
from moetk.routing import Routing, need


def hf_load_balancing(
    routings: Sequence[Routing], attention_mask: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """Bit for bit the value of `load_balancing_loss_func` over all layers' logits, a fp32 scalar.

    routings: one TokenChoice a layer, in the model's order. attention_mask: (B, S) or (T,), 1 = a
    real token. top_k: None = the first routing's number of columns.

    What it computes differs from `LoadBalancingLoss` in three ways: it pools counts and
    probabilities over the layers before the product, so that layers collapsed on different experts
    cancel; it is not divided by K (K where balanced); and it counts the top K of softmax(logits),
    in the dtype of the logits, whatever the router chose. With no token at all it is NaN, as there.

    Raises MissingFieldError without routings or without logits_TE; MoeShapeError when the mask is
    not of T tokens; UnsupportedRoutingError for an ExpertChoice or SoftChoice.
    Source: transformers 5.23 and 5.17, models/mixtral/modeling_mixtral.py.
    """
    if not routings:
        raise MissingFieldError(
            "hf_load_balancing got no routings: pass one TokenChoice for each layer, as recorded."
        )
    if top_k is None:
        top_k = as_token_choice(routings[0], "hf_load_balancing").experts_TK.shape[1]
    layers_TE = [need(routing, "logits_TE", "hf_load_balancing") for routing in routings]
    num_tokens, num_experts = layers_TE[0].shape
    counts_E = prob_sums_E = torch.zeros(num_experts, device=layers_TE[0].device)
    mask_T = torch.ones(num_tokens, device=counts_E.device)
    if attention_mask is not None:
        if attention_mask.numel() != num_tokens:
            raise MoeShapeError(
                f"hf_load_balancing: attention_mask is {tuple(attention_mask.shape)}, but "
                f"logits_TE has T={num_tokens} tokens."
            )
        mask_T = attention_mask.reshape(-1).to(mask_T)

    for logits_TE in layers_TE:
        probs_TE = logits_TE.to(counts_E.device).softmax(-1)
        chosen_TK = probs_TE.topk(top_k, -1).indices
        layer_E = torch.zeros_like(counts_E).scatter_add(
            0, chosen_TK.flatten(), mask_T.repeat_interleave(top_k)
        )
        counts_E = counts_E + layer_E
        prob_sums_E = prob_sums_E + (probs_TE.float() * mask_T[:, None]).sum(0)

    # Summed layer by layer, and a plain number without a mask: dividing by one rounds otherwise
    # than dividing by a tensor on some devices.
    rows = sum(
        (float(num_tokens) if attention_mask is None else mask_T.sum() for _ in layers_TE), 0.0
    )
    return (counts_E / rows * (prob_sums_E / rows)).sum() * num_experts
