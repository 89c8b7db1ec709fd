"""From tokens to experts and weights: the router's product and what its recipe makes of the logits.

On CUDA, for operands of 16 bits, both are one kernel (`moetk.kernels.gpu.route`), and the sort plan
comes with it; else a product and `choose`. In plain eager CUDA all of it is one node of the graph,
since a node costs the host what a kernel costs the device; elsewhere the kernel is the op
`moetk::route`, and the rest `moetk::router_logits` and `moetk::choose`.

Letters: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetk.errors import MoeShapeError
from moetk.kernels.choose import choose, choose_backward, choose_in_torch
from moetk.kernels.direct import PLAIN, direct, node, on_device_of
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.recipe import FIELDS, Recipe, check_recipe
from moetk.kernels.router_logits import (
    backward_in_summands,
    check_width,
    product_in_fp32,
    router_logits,
    router_logits_backward,
)
from moetk.kernels.sort_plan import Known, known_of
from moetk.memo import remembered

MOST_EXPERTS = 128  # the columns of a tile, which the kernel keeps in registers


class Routed(NamedTuple):
    """experts_TK and weights_TK as in `choose`, logits_TE as in `router_logits`; where the recipe's
    scores are the logits themselves, these are in the score dtype. known: for `sort_plan`."""

    experts_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    known: Known | None = None


def route(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    choice_bias_E: Tensor | None,
    top_k: int,
    recipe: Recipe,
    gemm_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
) -> Routed:
    """x_TH (T, H), weight_EH (E, H); bias_E is added to the logits, choice_bias_E as in `choose`.

    The gradient of the logits counts too: of a loss that reads them. Raises as `router_logits` and
    `choose`, and MoeShapeError for a bias that is not (E,).
    """
    if bias_E is not None:
        _check_bias("bias_E", bias_E, weight_EH)
    if choice_bias_E is not None:
        _check_bias("choice_bias_E", choice_bias_E, weight_EH)
    tensors = (x_TH, weight_EH, bias_E, choice_bias_E)
    settings = (top_k, gemm_dtype or x_TH.dtype, weight_dtype)
    if direct(x_TH):
        check_width(x_TH, weight_EH)
        _check_recipe(recipe, weight_EH.shape[0], top_k)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3]):
            return Routed(*_node(*tensors, settings, recipe))
        # Without a node of the graph, which costs the host what a launch costs.
        return _forward(*tensors, *settings, recipe)
    if x_TH.is_cuda and in_one_kernel(x_TH, weight_EH, settings[1], recipe):
        check_width(x_TH, weight_EH)
        check_recipe(recipe, weight_EH.shape[0], top_k)
        weights_TK, experts_TK, logits_TE = _route(*tensors, *settings, *recipe)
        return Routed(experts_TK, weights_TK, logits_TE)
    logits_TE = router_logits(x_TH, weight_EH, bias_E, gemm_dtype)
    if recipe.score == "identity":
        logits_TE = logits_TE.to(recipe.score_dtype or logits_TE.dtype)
    return Routed(*choose(logits_TE, choice_bias_E, top_k, recipe, weight_dtype), logits_TE)


def _check_bias(name: str, bias: Tensor, weight_EH: Tensor) -> None:
    if bias.shape != weight_EH.shape[:1]:
        raise MoeShapeError(
            f"route: {name} is {tuple(bias.shape)}, expected (E={weight_EH.shape[0]},)."
        )


_check_recipe = remembered(check_recipe)


def in_one_kernel(x_TH: Tensor, weight_EH: Tensor, dtype: torch.dtype, recipe: Recipe) -> bool:
    """Whether the kernel computes logits of this dtype: products of 16-bit operands, which are
    exact in fp32, in which they are added up. Its columns are the experts in their order, padded at
    the end, as groups whose size is no power of two are not."""
    narrow, num_experts = x_TH.dtype, weight_EH.shape[0]
    return (
        (narrow is torch.bfloat16 or narrow is torch.float16)
        and weight_EH.dtype is narrow
        and type(weight_EH) in PLAIN
        and weight_EH.get_device() == x_TH.get_device()
        and (dtype is narrow or dtype is torch.float32)
        and num_experts <= MOST_EXPERTS
        and not (recipe.limited and (num_experts & (num_experts - 1)))
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Asked before it is cast: on the host a cast to the same costs as much as a launch."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def _gpu() -> Any:
    """The kernel's module; it imports Triton."""
    from moetk.kernels.gpu import route

    return route


@functools.cache
def _gpu_choice() -> Any:
    """The module of the choice by itself; it imports Triton."""
    from moetk.kernels.gpu import choose

    return choose


def _forward(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    choice_bias_E: Tensor | None,
    top_k: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    recipe: Recipe,
    wants_plan: bool = True,
) -> Routed:
    """The kernels, called as they are. wants_plan: False where it would not be handed on."""
    with on_device_of(x_TH):
        if in_one_kernel(x_TH, weight_EH, dtype, recipe):
            wants_plan = wants_plan and not torch.is_inference_mode_enabled()
            settings = (top_k, recipe, dtype, weight_dtype)
            weights_TK, experts_TK, logits_TE, plan = _gpu().route_on_gpu(
                x_TH, weight_EH, bias_E, choice_bias_E, *settings, wants_plan
            )
            return Routed(experts_TK, weights_TK, logits_TE, known_of(experts_TK, plan))
        if _widens(x_TH, weight_EH, dtype):
            logits_TE = product_in_fp32(x_TH, weight_EH)
            logits_TE = logits_TE if bias_E is None else logits_TE + bias_E
        elif bias_E is None:
            logits_TE = torch.mm(_cast(x_TH, dtype), _cast(weight_EH, dtype).t())
        else:
            operands = (_cast(tensor, dtype) for tensor in (bias_E, x_TH, weight_EH.t()))
            logits_TE = torch.addmm(*operands)
        if recipe.score == "identity" and recipe.score_dtype is not None:
            logits_TE = _cast(logits_TE, recipe.score_dtype)
        experts_TK, weights_TK = _gpu_choice().choose_on_gpu(
            logits_TE, choice_bias_E, top_k, recipe, weight_dtype
        )
        return Routed(experts_TK, weights_TK, logits_TE)


def _widens(x_TH: Tensor, weight_EH: Tensor, dtype: torch.dtype) -> bool:
    """fp32 logits of bf16 operands, whose gradients are products of two bf16 summands."""
    return dtype == torch.float32 and x_TH.dtype == weight_EH.dtype == torch.bfloat16


def _backward(
    ctx: Any,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    dweights_TK: Tensor | None,
    dlogits_TE: Tensor | None,
    through_choice: Any,
    in_summands: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias. saved: what `_keep` kept, which may be unpacked once.
    through_choice, in_summands: `choose_backward` and `router_logits_backward`, as operators or as
    what these call."""
    refuse_second_order(
        "the fused router", 'backend="reference", whose routers torch differentiates twice'
    )
    x_TH, weight_EH, logits_TE, experts_TK = saved
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dx_TH = dweight_EH = dbias_E = None
    if dweights_TK is not None:
        chosen_TE = through_choice(dweights_TK, logits_TE, experts_TK, ctx.recipe)
        dlogits_TE = chosen_TE if dlogits_TE is None else chosen_TE + dlogits_TE
    if dlogits_TE is None:
        return None, None, None
    dtype = ctx.dtype
    dlogits_TE = _cast(dlogits_TE, dtype)
    if wants_bias:
        dbias_E = _cast(dlogits_TE.sum(0), ctx.bias_dtype)
    if _widens(x_TH, weight_EH, dtype):
        dx_TH, dweight_EH = in_summands(dlogits_TE, x_TH, weight_EH, wants_x, wants_weight)
    else:
        if wants_x:
            dx_TH = _cast(torch.mm(dlogits_TE, _cast(weight_EH, dtype)), x_TH.dtype)
        if wants_weight:
            dweight_EH = torch.mm(dlogits_TE.t(), _cast(x_TH, dtype))
            dweight_EH = _cast(dweight_EH, weight_EH.dtype)
    return dx_TH if wants_x else None, dweight_EH if wants_weight else None, dbias_E


def _keep(
    ctx: Any, tensors: Any, dtype: torch.dtype, recipe: Recipe, experts: Tensor, logits: Tensor
) -> None:
    """What backward reads."""
    x_TH, weight_EH, bias_E, _ = tensors
    ctx.recipe, ctx.dtype = recipe, dtype
    ctx.bias_dtype = None if bias_E is None else bias_E.dtype
    ctx.save_for_backward(x_TH, weight_EH, logits, experts)
    ctx.set_materialize_grads(False)


class _Direct(torch.autograd.Function):
    """One node; see `direct`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_EH: Tensor,
        bias_E: Tensor | None,
        choice_bias_E: Tensor | None,
        settings: tuple[int, torch.dtype, torch.dtype | None],
        recipe: Recipe,
    ) -> Routed:
        tensors = (x_TH, weight_EH, bias_E, choice_bias_E)
        routed = _forward(*tensors, *settings, recipe)
        _keep(ctx, tensors, settings[1], recipe, routed.experts_TK, routed.logits_TE)
        ctx.mark_non_differentiable(routed.experts_TK)
        return routed

    @staticmethod
    def backward(
        ctx: Any, _: None, dweights_TK: Tensor | None, dlogits_TE: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        saved, through_choice = ctx.saved_tensors, _gpu_choice().choose_backward_on_gpu
        with on_device_of(saved[0]):
            grads = _backward(
                ctx, saved, dweights_TK, dlogits_TE, through_choice, backward_in_summands
            )
        return (*grads, None, None, None)


_node = node(_Direct)


# An op's arguments are tensors, numbers and names: it takes the recipe's fields one by one.
@torch.library.custom_op(
    "moetk::route",
    mutates_args=(),
    schema="(Tensor x_TH, Tensor weight_EH, Tensor? bias_E, Tensor? choice_bias_E, int top_k, "
    f"ScalarType dtype, ScalarType? weight_dtype, {FIELDS}) -> (Tensor, Tensor, Tensor)",
)
def _route(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """weights_TK, experts_TK and logits_TE."""
    (x_TH, weight_EH, bias_E, choice_bias_E), (top_k, dtype, weight_dtype), recipe = _read(args)
    logits_TE = x_TH.float() @ weight_EH.float().t()
    logits_TE = (logits_TE if bias_E is None else logits_TE + bias_E.to(dtype)).to(dtype)
    if recipe.score == "identity":
        logits_TE = logits_TE.to(recipe.score_dtype or dtype)
    experts_TK, weights_TK = choose_in_torch(logits_TE, choice_bias_E, top_k, recipe)
    return weights_TK.to(weight_dtype or weights_TK.dtype), experts_TK.contiguous(), logits_TE


def _read(args: Any) -> tuple[Any, Any, Recipe]:
    """Tensors, settings and recipe of the op's arguments."""
    return args[:4], args[4:7], Recipe(*args[7:])


@_route.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, settings, recipe = _read(args)
    routed = _forward(*tensors, *settings, recipe, wants_plan=False)  # type: ignore[call-arg,misc]
    return routed.weights_TK, routed.experts_TK, routed.logits_TE


@_route.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (x_TH, weight_EH, *_), (top_k, dtype, weight_dtype), recipe = _read(args)
    score_dtype, tokens = recipe.score_dtype or dtype, x_TH.shape[0]
    logits_dtype = score_dtype if recipe.score == "identity" else dtype
    return (
        x_TH.new_empty((tokens, top_k), dtype=weight_dtype or score_dtype),
        x_TH.new_empty((tokens, top_k), dtype=torch.int64),
        x_TH.new_empty((tokens, weight_EH.shape[0]), dtype=logits_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, (_, dtype, _), recipe = _read(inputs)
    _keep(ctx, tensors, dtype, recipe, *output[1:])
    ctx.num_inputs = len(inputs)


def _op_backward(
    ctx: Any, dweights_TK: Tensor | None, _: None, dlogits_TE: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, operators = ctx.saved_tensors, (choose_backward, router_logits_backward)
    grads = _backward(ctx, saved, dweights_TK, dlogits_TE, *operators)
    return (*grads, *(None,) * (ctx.num_inputs - 3))


_route.register_autograd(_op_backward, setup_context=_save)
