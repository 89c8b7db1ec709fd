"""What Transformer Engine's products multiply: tensors as they are, or in FP8 by a recipe of its
`autocast`. Read against its version 2.12.

On Hopper FP8 multiplies rows by rows only (cuBLAS's TN layout), so that an operand which is summed
over its rows carries a transposed copy ("columnwise"). That copy's rows are as long as the expert
has rows, and must be multiples of 16: hence the padding.

Letters: T tokens, U rows in expert order, E experts, B any width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moetk.errors import BackendError
from moetk.kernels.gpu.te_rows import ExpertRows, gather

Operand = list[Any]  # one tensor, or one of TE's quantised storages, for each expert


class Maker(Protocol):
    """Operands from tensors. rowwise: for a sum over the width; columnwise: over the rows."""

    def tokens(self, x_TB: Tensor, rows: ExpertRows, *, rowwise: bool, columnwise: bool) -> Operand:
        """Of tokens (contiguous), gathered into the rows of their experts."""

    def rows(self, y_UB: Tensor, counts: list[int], *, rowwise: bool, columnwise: bool) -> Operand:
        """Of rows in expert order (contiguous), `counts` of them for each expert."""


class Plain:
    """The tensors as they are, in views."""

    def tokens(self, x_TB: Tensor, rows: ExpertRows, *, rowwise: bool, columnwise: bool) -> Operand:
        return list(gather(x_TB, rows.source_U).split(rows.counts))

    def rows(self, y_UB: Tensor, counts: list[int], *, rowwise: bool, columnwise: bool) -> Operand:
        return list(y_UB.split(counts))


@dataclass(frozen=True)
class PerTensor:
    """FP8 with one scale for a whole tensor: of all tokens, all rows, all experts' weights.

    TE's layers scale each expert's part by its own largest value. One scale lets tokens be
    quantised before they are gathered, so that T rows are read and not T * K, and takes three
    launches instead of three for each expert.
    """

    quantizer: Any

    def tokens(self, x_TB: Tensor, rows: ExpertRows, *, rowwise: bool, columnwise: bool) -> Operand:
        import transformer_engine_torch as tex

        whole = tex.quantize(x_TB, self.quantizer)
        rows_UB = gather(whole._data, rows.source_U)  # bytes; a zero byte is an FP8 zero
        return self._parts(rows_UB, whole._scale_inv, rows.counts, columnwise)

    def rows(self, y_UB: Tensor, counts: list[int], *, rowwise: bool, columnwise: bool) -> Operand:
        import transformer_engine_torch as tex

        whole = tex.quantize(y_UB, self.quantizer)
        return self._parts(whole._data, whole._scale_inv, counts, columnwise)

    def _parts(
        self, data_UB: Tensor, scale: Tensor, counts: list[int], columnwise: bool
    ) -> Operand:
        import transformer_engine_torch as tex
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (
            Float8TensorStorage,
        )

        dtype = self.quantizer.dtype
        return [
            Float8TensorStorage(
                data=part,
                fp8_scale_inv=scale,
                fp8_dtype=dtype,
                data_transpose=tex.fp8_transpose(part, dtype, out=None) if columnwise else None,
            )
            for part in data_UB.split(counts)
        ]


@dataclass(frozen=True)
class PerBlock:
    """FP8 with a scale for each 128 numbers of a row or column (dimensions 1), or each 128 x 128
    (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Columnwise blocks run along one expert's rows, so that nothing can be quantised before the rows
    are gathered.
    """

    dtype: Any
    dimensions: int
    power_of_two: bool
    epsilon: float

    def tokens(self, x_TB: Tensor, rows: ExpertRows, *, rowwise: bool, columnwise: bool) -> Operand:
        rows_UB = gather(x_TB, rows.source_U)
        return self.rows(rows_UB, rows.counts, rowwise=rowwise, columnwise=columnwise)

    def rows(self, y_UB: Tensor, counts: list[int], *, rowwise: bool, columnwise: bool) -> Operand:
        import transformer_engine_torch as tex
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

        quantizer = Float8BlockQuantizer(
            self.dtype,
            rowwise=rowwise or self.dimensions == 2,  # TE's kernel for squares writes these always
            columnwise=columnwise,
            amax_epsilon=self.epsilon,
            force_pow_2_scales=self.power_of_two,
            block_scaling_dim=self.dimensions,
        )
        quantizer.internal = True  # plain storages, not tensor subclasses
        parts: Operand = tex.split_quantize(y_UB, counts, [quantizer] * len(counts))
        return parts


@dataclass(frozen=True)
class Numbers:
    """Who makes the operands of a step's products, and how those add up.

    align: each expert's rows are a multiple of it. outputs_split, inputs_split, weights_split:
    whether the products for outputs, for gradients of inputs and of weights add up in steps (TE's
    split accumulator), which FP8 alone asks for.
    """

    inputs: Maker
    gradients: Maker
    weights: Maker
    align: int = 1
    outputs_split: bool = False
    inputs_split: bool = False
    weights_split: bool = False


PLAIN = Numbers(Plain(), Plain(), Plain())


def in_fp8() -> bool:
    """Whether this is within transformer_engine's `autocast`."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    return bool(FP8GlobalStateManager.is_fp8_enabled())


def numbers_here(device: torch.device) -> Numbers:
    """The tensors' own dtype; within transformer_engine's `autocast`, FP8 by its recipe.

    Raises BackendError for a recipe other than Float8CurrentScaling and Float8BlockScaling.
    """
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    if not in_fp8():
        return PLAIN
    recipe = FP8GlobalStateManager.get_fp8_recipe()
    if recipe.float8_current_scaling():
        makers = _per_tensor(recipe, device)
    elif recipe.float8_block_scaling():
        makers = _per_block(recipe)
    else:
        raise BackendError(
            f'backend="te": recipe {type(recipe).__name__} is none of Float8CurrentScaling and '
            "Float8BlockScaling. Pass one of them to transformer_engine's autocast."
        )
    return Numbers(
        *makers,
        align=16,
        outputs_split=recipe.fp8_gemm_fprop.use_split_accumulator,
        inputs_split=recipe.fp8_gemm_dgrad.use_split_accumulator,
        weights_split=recipe.fp8_gemm_wgrad.use_split_accumulator,
    )


def _per_tensor(recipe: Any, device: torch.device) -> tuple[Maker, Maker, Maker]:
    from transformer_engine.pytorch.quantization import get_fp8_te_dtype
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    def maker(params: Any, forward: bool) -> Maker:
        quantizer = Float8CurrentScalingQuantizer(
            get_fp8_te_dtype(recipe, fprop_tensor=forward),
            device,
            rowwise=True,
            columnwise=False,
            force_pow_2_scales=params.power_2_scale,
            amax_epsilon=params.amax_epsilon,
        )
        quantizer.internal = True  # plain storages, not tensor subclasses
        return PerTensor(quantizer)

    return (
        maker(recipe.fp8_quant_fwd_inp, True),
        maker(recipe.fp8_quant_bwd_grad, False),
        maker(recipe.fp8_quant_fwd_weight, True),
    )


def _per_block(recipe: Any) -> tuple[Maker, Maker, Maker]:
    from transformer_engine.pytorch.quantization import get_fp8_te_dtype

    def maker(params: Any, dimensions: int, forward: bool) -> Maker:
        dtype = get_fp8_te_dtype(recipe, fprop_tensor=forward)
        return PerBlock(dtype, dimensions, params.power_2_scale, params.amax_epsilon)

    return (
        maker(recipe.fp8_quant_fwd_inp, recipe.x_block_scaling_dim, True),
        maker(recipe.fp8_quant_bwd_grad, recipe.grad_block_scaling_dim, False),
        maker(recipe.fp8_quant_fwd_weight, recipe.w_block_scaling_dim, True),
    )
