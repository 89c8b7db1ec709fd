"""The one matrix that most routers begin with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetk.errors import MoeShapeError, RouterConfigError
from moetk.held import held
from moetk.kernels.selection import Tie
from moetk.settings import check_float_dtype, check_whole


class LinearRouter(nn.Module):
    """One matrix to logits. A convenience, not a base class to obey: any `(x_TH, ctx) -> Routing`
    is a router.

    bias: a learned bias on the logits. choice_bias: a buffer that is added where experts are
    chosen and never where they are weighed; a controller steers it, no gradient does.
    gemm_dtype: what x and the weight are cast to for the product; None = the dtype of x.
    score_dtype: what scores are computed in; None = the dtype of the logits.
    tie: which of two equal scores is chosen, "low" = the lower id, "stock" = torch.topk's pick, as
    transformers takes it (see `moetk.kernels.selection.largest`).

    Parameters carry transformers' names: weight (E, H), bias (E,), e_score_correction_bias (E,).
    A forward reads these and the plain settings below, nothing else.
    Raises RouterConfigError unless sizes are whole numbers with 1 <= top_k <= num_experts, and
    dtypes are floating or None.
    """

    duplicates = False  # True = one token may name one expert twice, and means it
    num_experts: int
    top_k: int
    gemm_dtype: torch.dtype | None = None
    score_dtype: torch.dtype | None = torch.float32
    tie: Tie = "low"
    weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        choice_bias: bool = False,
        gemm_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = torch.float32,
        tie: Tie = "low",
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_whole(who, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise RouterConfigError(
                f"{who}: top_k={top_k} but num_experts={num_experts}; "
                f"need 1 <= top_k <= {num_experts}."
            )
        if tie not in ("low", "stock"):
            raise RouterConfigError(
                f"{who}: tie={tie!r} is not a rule; use tie='low' or tie='stock'."
            )
        check_float_dtype(who, gemm_dtype=gemm_dtype, score_dtype=score_dtype)
        self.num_experts, self.top_k, self.tie = num_experts, top_k, tie
        self.gemm_dtype, self.score_dtype = gemm_dtype, score_dtype
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * hidden_size**-0.5)
        if bias:
            self.bias = nn.Parameter(torch.zeros(num_experts))
        if choice_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def logits(self, x_TH: Tensor) -> Tensor:
        """x W' + b, (T, E), in the dtype of the product, not yet rounded to score_dtype.

        Raises MoeShapeError when x_TH has another width than the weight.
        """
        weight, bias = self.weight, held(self, "bias")
        if x_TH.ndim != 2 or x_TH.shape[1] != weight.shape[1]:
            raise MoeShapeError(
                f"{type(self).__name__}: x_TH is {tuple(x_TH.shape)}, expected "
                f"(T, H={weight.shape[1]}): flatten the batch, and check hidden_size."
            )
        dtype = self.gemm_dtype or x_TH.dtype
        return F.linear(x_TH.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def in_score_dtype(self, logits_TE: Tensor) -> Tensor:
        """The logits in the dtype that scores are computed in."""
        return logits_TE.to(self.score_dtype or logits_TE.dtype)

    def with_choice_bias(self, scores_TE: Tensor) -> Tensor:
        """The scores plus e_score_correction_bias, where this router has one."""
        bias = held(self, "e_score_correction_bias")
        return scores_TE if bias is None else scores_TE + bias

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}"
