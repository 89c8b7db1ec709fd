"""From logits to experts and weights in one op: `moetk::choose`, and its gradient.

On the CPU the op is the torch code below, which states what it computes; on CUDA it is one kernel
each way (`moetk.kernels.gpu.choose`).

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.kernels.direct import on_device_of
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.recipe import FIELDS, Recipe, Score, check_recipe
from moetk.kernels.selection import gather, in_best_groups, largest, normalise, softmax_over

MAX_EXPERTS = 1024  # a row of the kernels stays in registers
MAX_TOP_K = 32


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    recipe: Recipe,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """experts_TK int64, best first, and weights_TK, as `recipe` says.

    bias_E: added where experts are chosen and never where they are weighed; it gets no gradient.
    weight_dtype: what the weights are rounded to at the end; None = the score dtype.

    Deterministic and without a wait for the device. A row with NaN in its logits names distinct
    experts in [0, E) too, and touches no other row. Backward reads the logits and experts_TK; it
    runs in float32 or wider, and no gradient of it is taken again.
    Raises as `check_recipe`; on CUDA, RouterConfigError past 1024 experts or 32 choices.
    """
    check_recipe(recipe, logits_TE.shape[1], top_k)
    weights_TK, experts_TK = _choose(logits_TE, bias_E, top_k, weight_dtype, *recipe)
    return experts_TK, weights_TK


def choose_backward(
    dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, recipe: Recipe
) -> Tensor:
    """`choose_backward_in_torch` as an operator."""
    dlogits_TE: Tensor = _choose_backward(dweights_TK, logits_TE, experts_TK, *recipe)
    return dlogits_TE


def choose_in_torch(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """What `choose` computes: experts_TK, and weights_TK in the score dtype."""
    scores_TE = _scores(logits_TE.to(recipe.score_dtype or logits_TE.dtype), recipe.score)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if recipe.limited:
        choice_TE = in_best_groups(choice_TE, recipe.groups, recipe.top_groups)
    experts_TK = largest(choice_TE, top_k)
    weigh = softmax_over if recipe.over_chosen else gather
    weights_TK = weigh(scores_TE, experts_TK)
    if recipe.renormalise:
        weights_TK = normalise(weights_TK, recipe.eps)
    return experts_TK, weights_TK * recipe.scale


def choose_backward_in_torch(
    dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, recipe: Recipe
) -> Tensor:
    """dlogits_TE in the dtype of the logits, for the choice experts_TK that `choose` took.

    Zero for what was not chosen, but for the softmax over all experts. Where sqrt(softplus)
    underflows to 0 its derivative is 0, as in the limit; torch's own chain has 0 * inf there.
    """
    score_dtype = recipe.score_dtype or logits_TE.dtype
    wide = torch.promote_types(score_dtype, torch.float32)
    wide_TE = logits_TE.to(score_dtype).to(wide)
    scores_TE = _scores(wide_TE, recipe.score)
    chosen_TK = scores_TE.gather(1, experts_TK)
    weights_TK = chosen_TK.softmax(-1) if recipe.over_chosen else chosen_TK
    dweights_TK = dweights_TK.to(wide) * recipe.scale
    if recipe.renormalise:
        total_T1 = weights_TK.sum(-1, keepdim=True) + recipe.eps
        total_T1 = total_T1 + (total_T1 == 0)
        mean_T1 = (dweights_TK * weights_TK).sum(-1, keepdim=True) / total_T1
        dweights_TK = (dweights_TK - mean_T1) / total_T1
    if recipe.over_chosen:
        mean_T1 = (dweights_TK * weights_TK).sum(-1, keepdim=True)
        dweights_TK = weights_TK * (dweights_TK - mean_T1)

    if recipe.score == "softmax":
        dscores_TE = torch.zeros_like(scores_TE).scatter(1, experts_TK, dweights_TK)
        mean_T1 = (dweights_TK * chosen_TK).sum(-1, keepdim=True)
        return (scores_TE * (dscores_TE - mean_T1)).to(logits_TE.dtype)
    if recipe.score == "sigmoid":
        dweights_TK = dweights_TK * chosen_TK * (1 - chosen_TK)
    elif recipe.score == "sqrt_softplus":
        slope_TK = wide_TE.gather(1, experts_TK).sigmoid() / (2 * chosen_TK)
        dweights_TK = dweights_TK * slope_TK.masked_fill(chosen_TK == 0, 0)
    return torch.zeros_like(scores_TE).scatter(1, experts_TK, dweights_TK).to(logits_TE.dtype)


def _scores(logits_TE: Tensor, score: Score) -> Tensor:
    if score == "softmax":
        return logits_TE.softmax(-1)
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrt_softplus":
        return F.softplus(logits_TE).sqrt()
    return logits_TE


# It returns the weights before the experts, for torch's opcheck adds outputs up from the first on.
@torch.library.custom_op(
    "moetk::choose",
    mutates_args=(),
    schema="(Tensor logits_TE, Tensor? bias_E, int top_k, ScalarType? weight_dtype, "
    f"{FIELDS}) -> (Tensor, Tensor)",
)
def _choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    weight_dtype: torch.dtype | None,
    *recipe: Any,
) -> tuple[Tensor, Tensor]:
    experts_TK, weights_TK = choose_in_torch(logits_TE, bias_E, top_k, Recipe(*recipe))
    return weights_TK.to(weight_dtype or weights_TK.dtype), experts_TK.contiguous()


@torch.library.custom_op(
    "moetk::choose_backward",
    mutates_args=(),
    schema=f"(Tensor dweights_TK, Tensor logits_TE, Tensor experts_TK, {FIELDS}) -> Tensor",
)
def _choose_backward(
    dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, *recipe: Any
) -> Tensor:
    return choose_backward_in_torch(dweights_TK, logits_TE, experts_TK, Recipe(*recipe))


@_choose.register_kernel("cuda")
def _(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    weight_dtype: torch.dtype | None,
    *recipe: Any,
) -> tuple[Tensor, Tensor]:
    from moetk.kernels.gpu.choose import choose_on_gpu

    with on_device_of(logits_TE):
        experts_TK, weights_TK = choose_on_gpu(
            logits_TE, bias_E, top_k, Recipe(*recipe), weight_dtype
        )
    return weights_TK, experts_TK


@_choose_backward.register_kernel("cuda")
def _(dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, *recipe: Any) -> Tensor:
    from moetk.kernels.gpu.choose import choose_backward_on_gpu

    with on_device_of(logits_TE):
        return choose_backward_on_gpu(dweights_TK, logits_TE, experts_TK, Recipe(*recipe))


@_choose.register_fake
def _(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    weight_dtype: torch.dtype | None,
    *recipe: Any,
) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], top_k)
    dtype = weight_dtype or Recipe(*recipe).score_dtype or logits_TE.dtype
    return logits_TE.new_empty(shape, dtype=dtype), logits_TE.new_empty(shape, dtype=torch.int64)


@_choose_backward.register_fake
def _(dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, *recipe: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


_FIRST_ORDER = "the fused router", 'backend="reference", whose routers torch differentiates twice'


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, _, _, _, *ctx.recipe = inputs
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(logits_TE, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dweights_TK: Tensor | None, dexperts_TK: None) -> tuple[Tensor | None, ...]:
    refuse_second_order(*_FIRST_ORDER)
    rest = (None,) * (ctx.num_inputs - 1)
    if dweights_TK is None:
        return None, *rest
    return _choose_backward(dweights_TK, *ctx.saved_tensors, *ctx.recipe), *rest


_choose.register_autograd(_backward, setup_context=_save)
