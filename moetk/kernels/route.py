"""From tokens to experts and weights: the router's product, then `choose`.

In plain eager CUDA both are one node of the graph, since each costs the host what a kernel costs
the device; elsewhere they are the ops `moetk::router_logits` and `moetk::choose`.

Letters: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moetk.kernels.choose import choose
from moetk.kernels.direct import direct, on_device_of
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.recipe import Recipe, check_recipe
from moetk.kernels.router_logits import (
    backward_in_summands,
    check_width,
    product_in_fp32,
    router_logits,
)


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    choice_bias_E: Tensor | None,
    top_k: int,
    recipe: Recipe,
    gemm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """experts_TK and weights_TK as in `choose`, and logits_TE as in `router_logits`; where the
    recipe's scores are the logits themselves, these are in the score dtype.

    The gradient of the logits counts too: of a loss that reads them. Raises as these two.
    """
    if direct(x_TH):
        check_width(x_TH, weight_EH)
        _checked(recipe, weight_EH.shape[0], top_k)
        weights_TK, experts_TK, logits_TE = _Direct.apply(
            x_TH, weight_EH, bias_E, choice_bias_E, (top_k, recipe, gemm_dtype, weight_dtype)
        )
        return experts_TK, weights_TK, logits_TE
    logits_TE = router_logits(x_TH, weight_EH, bias_E, gemm_dtype)
    if recipe.score == "identity":
        logits_TE = logits_TE.to(recipe.score_dtype or logits_TE.dtype)
    return *choose(logits_TE, choice_bias_E, top_k, recipe, weight_dtype), logits_TE


_checked = functools.cache(check_recipe)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Asked before it is cast: on the host a cast to the same costs as much as a launch."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def _gpu() -> Any:
    """The kernels' module; it imports Triton."""
    from moetk.kernels.gpu import choose

    return choose


class _Direct(torch.autograd.Function):
    """The kernels of both ops, called as they are; see `direct`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_EH: Tensor,
        bias_E: Tensor | None,
        choice_bias_E: Tensor | None,
        settings: tuple[int, Recipe, torch.dtype | None, torch.dtype | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        top_k, recipe, gemm_dtype, weight_dtype = settings
        dtype = gemm_dtype or x_TH.dtype
        widens = dtype == torch.float32 and x_TH.dtype == weight_EH.dtype == torch.bfloat16
        with on_device_of(x_TH):
            if widens:
                logits_TE = product_in_fp32(x_TH, weight_EH)
                logits_TE = logits_TE if bias_E is None else logits_TE + bias_E
            elif bias_E is None:
                logits_TE = torch.mm(_cast(x_TH, dtype), _cast(weight_EH, dtype).t())
            else:
                operands = (_cast(tensor, dtype) for tensor in (bias_E, x_TH, weight_EH.t()))
                logits_TE = torch.addmm(*operands)
            if recipe.score == "identity" and recipe.score_dtype is not None:
                logits_TE = _cast(logits_TE, recipe.score_dtype)
            experts_TK, weights_TK = _gpu().choose_on_gpu(
                logits_TE, choice_bias_E, top_k, recipe, weight_dtype
            )
        ctx.recipe, ctx.widens, ctx.dtype = recipe, widens, dtype
        ctx.bias_dtype = None if bias_E is None else bias_E.dtype
        ctx.save_for_backward(x_TH, weight_EH, logits_TE, experts_TK)
        ctx.mark_non_differentiable(experts_TK)
        ctx.set_materialize_grads(False)
        return weights_TK, experts_TK, logits_TE

    @staticmethod
    def backward(
        ctx: Any, dweights_TK: Tensor | None, _: None, dlogits_TE: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_order(
            "the fused router", 'backend="reference", whose routers torch differentiates twice'
        )
        x_TH, weight_EH, logits_TE, experts_TK = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx_TH = dweight_EH = dbias_E = None
        with on_device_of(x_TH):
            if dweights_TK is not None:
                chosen_TE = _gpu().choose_backward_on_gpu(
                    dweights_TK, logits_TE, experts_TK, ctx.recipe
                )
                dlogits_TE = chosen_TE if dlogits_TE is None else chosen_TE + dlogits_TE
            if dlogits_TE is None:
                return (None,) * 5
            dlogits_TE = _cast(dlogits_TE, ctx.dtype)
            if wants_bias:
                dbias_E = _cast(dlogits_TE.sum(0), ctx.bias_dtype)
            if ctx.widens:
                dx_TH, dweight_EH = backward_in_summands(
                    dlogits_TE, x_TH, weight_EH, wants_x, wants_weight
                )
            else:
                if wants_x:
                    dx_TH = torch.mm(dlogits_TE, _cast(weight_EH, ctx.dtype))
                    dx_TH = _cast(dx_TH, x_TH.dtype)
                if wants_weight:
                    dweight_EH = torch.mm(dlogits_TE.t(), _cast(x_TH, ctx.dtype))
                    dweight_EH = _cast(dweight_EH, weight_EH.dtype)
        given = (dx_TH if wants_x else None, dweight_EH if wants_weight else None, dbias_E)
        return (*given, None, None)
