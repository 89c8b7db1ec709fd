"""The bank's products by Transformer Engine: for each expert one of cuBLAS's, dealt out to four
streams. Read against its version 2.12.

TE reads NVTE_USE_CUTLASS_GROUPED_GEMM=1 at every call: in bf16 and fp16 the products over rows are
then one kernel for all experts, which serves thin experts and not fat ones. It is left as the user
has it: thin ones are faster on moetk's own kernels.

Letters: U rows in expert order, E experts, A and B widths, O a matrix's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetk.kernels.gpu.te_numbers import Numbers, Operand


@dataclass(frozen=True)
class Products:
    """Three products with a matrix of every expert, over rows of which each has `counts`.

    transposed: matrices are (E, in, out) instead of (E, out, in).
    """

    counts: list[int]
    numbers: Numbers
    transposed: bool

    def outputs(self, inputs: Operand, weight: Tensor, bias_EO: Tensor | None) -> Tensor:
        """(U, out): each row times its expert's matrix, and its bias. inputs: rowwise."""
        split = self.numbers.outputs_split
        return self._times(inputs, weight, bias_EO, columns_first=self.transposed, split=split)

    def inputs(self, outputs: Operand, weight: Tensor) -> Tensor:
        """(U, in): the gradient of `outputs`'s inputs, from that of the outputs, rowwise."""
        split = self.numbers.inputs_split
        return self._times(outputs, weight, None, columns_first=not self.transposed, split=split)

    def gradient(
        self, outputs: Operand, inputs: Operand, weight: Tensor, into: Tensor | None
    ) -> Tensor:
        """The weight's gradient in its own layout, from the outputs' and the inputs, both
        columnwise. into: what it is added to and returned as; None = a new tensor. An expert
        without rows has zeros, or nothing is added."""
        gradient = torch.empty_like(weight) if into is None else into
        left, right = (inputs, outputs) if self.transposed else (outputs, inputs)
        self._grouped(
            right,
            left,
            list(gradient.unbind()),
            gradient.dtype,
            layout="NT",
            grad=True,
            accumulate=into is not None,
            use_split_accumulator=self.numbers.weights_split,
        )
        return gradient

    def _times(
        self,
        rows: Operand,
        weight_EAB: Tensor,
        bias_EO: Tensor | None,
        *,
        columns_first: bool,
        split: bool,
    ) -> Tensor:
        """(U, O). The matrix is (O, in) as it lies, or with columns_first (in, O), which is read
        columnwise."""
        num_experts, height, width = weight_EAB.shape
        matrices = self.numbers.weights.rows(  # a stack of matrices is rows in expert order
            weight_EAB.flatten(0, 1),
            [height] * num_experts,
            rowwise=not columns_first,
            columnwise=columns_first,
        )
        out_UO = weight_EAB.new_empty(sum(self.counts), width if columns_first else height)
        self._grouped(
            matrices,
            rows,
            [out_UO],
            out_UO.dtype,
            layout="NN" if columns_first else "TN",
            bias=None if bias_EO is None else list(bias_EO.unbind()),
            use_bias=bias_EO is not None,
            use_split_accumulator=split,
            single_output=True,
        )
        return out_UO

    def _grouped(
        self, a: Operand, b: Operand, outs: list[Tensor], dtype: torch.dtype, **how: Any
    ) -> None:
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

        outputs_stay = [None] * len(self.counts)  # no quantiser of outputs: they are not FP8
        general_grouped_gemm(a, b, outs, outputs_stay, dtype, m_splits=self.counts, **how)
