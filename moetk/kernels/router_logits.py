"""fp32 logits of low-precision tokens, without an fp32 copy of the tokens: `moetk::router_logits`.

Letters: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.errors import MoeShapeError
from moetk.kernels.direct import on_device_of
from moetk.kernels.first_order import refuse_second_order


def router_logits(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W' + b, (T, E), in gemm_dtype; None = the dtype of x.

    Where x and the weight are bfloat16 and gemm_dtype is float32, the product on CUDA reads them as
    they are: products of bfloat16 numbers are exact in float32, in which they are added up. Only x
    and the weight are kept for backward, which writes each fp32 gradient as two bfloat16 summands
    (16 of its 24 bits; the results are rounded to the 8 of bfloat16). Otherwise all are cast: an
    fp32 weight does not fit into bfloat16, and gradients do not fit into the range of float16.

    Raises MoeShapeError when x_TH has another width than the weight.
    """
    check_width(x_TH, weight_EH)
    dtype = gemm_dtype or x_TH.dtype
    bias_E = None if bias_E is None else bias_E.to(dtype)
    if dtype == torch.float32 and x_TH.dtype == weight_EH.dtype == torch.bfloat16:
        logits_TE: Tensor = _router_logits(x_TH, weight_EH)
        return logits_TE if bias_E is None else logits_TE + bias_E
    return F.linear(x_TH.to(dtype), weight_EH.to(dtype), bias_E)


def check_width(x_TH: Tensor, weight_EH: Tensor) -> None:
    """Raise MoeShapeError unless x_TH is (T, H) for a weight (E, H)."""
    if x_TH.ndim != 2 or x_TH.shape[1] != weight_EH.shape[1]:
        raise MoeShapeError(
            f"router_logits: x_TH is {tuple(x_TH.shape)}, expected (T, H={weight_EH.shape[1]}): "
            "flatten the batch, and check hidden_size."
        )


@torch.library.custom_op("moetk::router_logits", mutates_args=())
def _router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    return F.linear(x_TH.float(), weight_EH.float())


@torch.library.custom_op("moetk::router_logits_backward", mutates_args=())
def router_logits_backward(
    dlogits_TE: Tensor, x_TH: Tensor, weight_EH: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx_TH and dweight_EH, each empty where it is not wanted."""
    dx_TH, dweight_EH = x_TH.new_empty(0), x_TH.new_empty(0)
    if wants_x:
        dx_TH = (dlogits_TE @ weight_EH.float()).to(x_TH.dtype)
    if wants_weight:
        dweight_EH = (dlogits_TE.t() @ x_TH.float()).to(x_TH.dtype)
    return dx_TH, dweight_EH


@_router_logits.register_kernel("cuda")
def product_in_fp32(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """fp32 logits of bf16 operands on the tensor cores."""
    return torch.mm(x_TH, weight_EH.t(), out_dtype=torch.float32)


@router_logits_backward.register_kernel("cuda")
def backward_in_summands(
    dlogits_TE: Tensor, x_TH: Tensor, weight_EH: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx_TH and dweight_EH of fp32 logits by bf16 products, each empty where it is not wanted."""
    from moetk.kernels.gpu.summands import two_summands

    dx_TH, dweight_EH = x_TH.new_empty(0), x_TH.new_empty(0)
    with on_device_of(x_TH):
        both_T2E = two_summands(dlogits_TE, x_TH.dtype)
    if wants_x:  # one product over 2E: the summands meet in its fp32 accumulator
        dx_TH = torch.mm(both_T2E, torch.cat([weight_EH, weight_EH]))
    if wants_weight:
        both_2EH = torch.mm(both_T2E.t(), x_TH, out_dtype=torch.float32)
        dweight_EH = both_2EH.view(2, *weight_EH.shape).sum(0, dtype=torch.float32).to(x_TH.dtype)
    return dx_TH, dweight_EH


@_router_logits.register_fake
def _(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    return x_TH.new_empty((x_TH.shape[0], weight_EH.shape[0]), dtype=torch.float32)


@router_logits_backward.register_fake
def _(
    dlogits_TE: Tensor, x_TH: Tensor, weight_EH: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    dx_TH = x_TH.new_empty(x_TH.shape if wants_x else (0,))
    dweight_EH = x_TH.new_empty(weight_EH.shape if wants_weight else (0,))
    return dx_TH, dweight_EH


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
    refuse_second_order("the fused router", 'backend="reference"')
    wants_x, wants_weight = ctx.needs_input_grad
    grads = router_logits_backward(dlogits_TE, *ctx.saved_tensors, wants_x, wants_weight)
    return grads[0] if wants_x else None, grads[1] if wants_weight else None


_router_logits.register_autograd(_backward, setup_context=_save)
