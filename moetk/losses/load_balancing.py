"""Load balancing: what a token prefers, weighed by how loaded that already is.

Letters: T tokens, E experts, K choices a token, R runs of tokens that share one count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import MoeShapeError, RouterConfigError
from moetk.kernels.counting import Sequences, check_length, count_choices
from moetk.losses.counted import as_token_choice, check_coefficient, counted_tokens, mean_over
from moetk.routing import Routing, need

Scope: TypeAlias = Literal["micro_batch", "sequence", "global_batch"]


def load_balancing(
    experts_TK: Tensor,
    scores_TE: Tensor,
    *,
    counted_T: Tensor | None = None,
    sequences: Sequences = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """E * sum_e share_e * P_e, a fp32 scalar: 1 where both are uniform, E / K where every token
    goes, with all its score, to the same K experts.

    share_e: expert e's share of the choices (f_e / K), a constant. P_e: the mean over tokens of
    scores_te / sum_e scores_te, whence the gradient; softmax scores already sum to one, sigmoid
    ones do not. Not bounded below by 1: share and P may disagree.

    experts_TK: int64, -1 = unused. scores_TE: floating, >= 0, of all experts, never of the chosen
    alone. counted_T: bool, None = all. sequences: more than one gives each its own share; the mean
    is over tokens, so that a sequence weighs as much as it has counted tokens. reduce: sums the
    (R, E) fp32 counts over ranks; P stays local, and the mean of the ranks' losses, weighed by
    their counted tokens, is the loss of the concatenated batch.

    Raises MoeShapeError when counted_T or a tensor of sequences is not (T,), or T tokens are not
    that many sequences of one length.
    Sources: arXiv 2101.03961 equations 4-6 (K = 1); 2401.06066 equations 12-14 (K > 1);
    2412.19437 equations 17-20 (sequences); 2501.11873 (ranks).
    """
    num_tokens, num_experts = scores_TE.shape
    counts_RE = count_choices(experts_TK, num_experts, counted_T, sequences).float()
    if reduce is not None:
        counts_RE = reduce(counts_RE)
    shares_RE = counts_RE / counts_RE.sum(-1, keepdim=True).clamp(min=1)

    # sum_e share_e P_e, token by token: the load that a token expects where it goes.
    runs = shares_RE.shape[0]
    scores_TE = scores_TE.float()
    scores_RSE = scores_TE.reshape(runs, num_tokens // max(runs, 1), num_experts)
    load_T = (scores_RSE * shares_RE[:, None]).sum(-1).flatten()
    mass_T = scores_TE.sum(-1)
    return num_experts * mean_over(load_T / (mass_T + (mass_T == 0)), counted_T)


@dataclass(frozen=True)
class LoadBalancingLoss:
    """coefficient * `load_balancing`, over the tokens that carry a label, else the unmasked ones.

    scope: over what the choices are counted. "micro_batch": this call. "sequence": each sequence
        of ctx.sequence_ids (ids in [0, T)), else of ctx.batch_shape. "global_batch": this call on
        all ranks; every rank must then make every forward.
    normalisation: "switch" is 1 where balanced. "hf" leaves out the division by K, as the
        auxiliary losses of Transformers do, and is K where balanced.
    reduce: for "global_batch", a callable that sums a tensor over ranks.

    Raises RouterConfigError for settings that cannot work; MissingFieldError without scores_TE;
    MissingContextError for scope="sequence" without batch_shape; UnsupportedRoutingError for an
    ExpertChoice or SoftChoice.
    """

    coefficient: float
    _: KW_ONLY
    scope: Scope = "micro_batch"
    normalisation: Literal["switch", "hf"] = "switch"
    reduce: Callable[[Tensor], Tensor] | None = None

    reads = ("scores_TE",)

    def __post_init__(self) -> None:
        check_coefficient(self)
        _check_choice(self, "scope", get_args(Scope))
        _check_choice(self, "normalisation", ("switch", "hf"))
        if self.scope == "global_batch" and self.reduce is None:
            raise RouterConfigError(
                'LoadBalancingLoss: scope="global_batch" counts over all ranks and reduce is None. '
                "Pass reduce=moetk.parallel.sum_over_ranks."
            )
        if self.scope != "global_batch" and self.reduce is not None:
            raise RouterConfigError(
                f'LoadBalancingLoss: reduce is given, but scope="{self.scope}" counts on one rank. '
                'Pass scope="global_batch", or leave reduce out.'
            )

    def __call__(self, routing: Routing, ctx: RouterContext) -> Tensor:
        routing = as_token_choice(routing, "LoadBalancingLoss")
        scores_TE = need(routing, "scores_TE", "LoadBalancingLoss")
        num_tokens = scores_TE.shape[0]
        loss = load_balancing(
            routing.experts_TK,
            scores_TE,
            counted_T=counted_tokens(ctx, num_tokens),
            sequences=sequences_of(ctx, num_tokens, self) if self.scope == "sequence" else 1,
            reduce=self.reduce,
        )
        per_choice = routing.experts_TK.shape[1] if self.normalisation == "hf" else 1
        return self.coefficient * per_choice * loss


@dataclass(frozen=True)
class DeepSeekSequenceLoss:
    """Balance within each sequence of what the scores alone would choose, without the bias.

    coefficient * `load_balancing` by sequence, with the share of the top K of scores_TE: the bias
    that steers the choice has its own controller, and must not hide a sequence's preference.
    arXiv 2412.19437 equations 17-20 (coefficient 1e-4). Raises as `LoadBalancingLoss`.
    """

    coefficient: float

    reads = ("scores_TE",)

    def __post_init__(self) -> None:
        check_coefficient(self)

    def __call__(self, routing: Routing, ctx: RouterContext) -> Tensor:
        top_k = as_token_choice(routing, "DeepSeekSequenceLoss").experts_TK.shape[1]
        scores_TE = need(routing, "scores_TE", "DeepSeekSequenceLoss")
        return self.coefficient * load_balancing(
            scores_TE.detach().topk(top_k, -1).indices,
            scores_TE,
            counted_T=counted_tokens(ctx, scores_TE.shape[0]),
            sequences=sequences_of(ctx, scores_TE.shape[0], self),
        )


@dataclass(frozen=True)
class GShardLoss:
    """coefficient * `load_balancing` of the first choices alone: the second may be thinned out at
    random, and what is random teaches nothing. arXiv 2006.16668, section 2.2; 1 where balanced.
    Raises as `LoadBalancingLoss`.
    """

    coefficient: float

    reads = ("scores_TE",)

    def __post_init__(self) -> None:
        check_coefficient(self)

    def __call__(self, routing: Routing, ctx: RouterContext) -> Tensor:
        first_T1 = as_token_choice(routing, "GShardLoss").experts_TK[:, :1]
        scores_TE = need(routing, "scores_TE", "GShardLoss")
        counted_T = counted_tokens(ctx, scores_TE.shape[0])
        return self.coefficient * load_balancing(first_T1, scores_TE, counted_T=counted_T)


def sequences_of(ctx: RouterContext, num_tokens: int, loss: object) -> Sequences:
    """Where the sequences are: ctx.sequence_ids, else the rows of ctx.batch_shape.

    Raises MissingContextError without either, MoeShapeError where they are not of T tokens.
    """
    if ctx.sequence_ids is not None:
        check_length("ctx.sequence_ids", ctx.sequence_ids, num_tokens)
        return ctx.sequence_ids
    shape: tuple[int, int] = cast(Any, ctx.require("batch_shape", loss))
    batch, length = shape
    if batch * length != num_tokens:
        raise MoeShapeError(f"ctx.batch_shape is {shape}, but there are T={num_tokens}.")
    return batch


def _check_choice(loss: LoadBalancingLoss, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(loss, name)
    if value not in choices:
        raise RouterConfigError(
            f"LoadBalancingLoss: {name}={value!r}; it is one of {', '.join(choices)}."
        )
