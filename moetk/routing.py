"""What a router returns: plain frozen values, nothing computed on construction.

Letters: T tokens of the flattened batch, E experts, K choices a token, C tokens an expert takes,
B sequences, S positions, P slots (expert-major).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

from moetk.errors import (
    DuplicateExpertError,
    ExpertIndexError,
    MissingFieldError,
    MoeDtypeError,
    MoeShapeError,
    NonFiniteRoutingError,
    RoutingWeightError,
)


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """Each token names its experts.

    experts_TK: int64 ids in [0, num_experts), columns in descending choice score; -1 = unused slot,
        whose weight is 0.
    weights_TK: floating; the gradient's path to the router. Any floating dtype: banks promote.
    num_experts: real experts plus special ones (zero, copy, ...), whose ids follow the real ones
        and which the bank names.
    logits_TE, scores_TE, choice_TE: before the score function; after it; what the selection saw
        (scores plus bias, masked groups). None = this router does not keep it.
    kept_TK: bool, None = all kept. A dropped choice keeps its id, so that losses count what was
        wanted, and has weight 0; what was dropped is counted from here.
    extras: what this method's own loss, or the next layer's router, reads.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    num_experts: int
    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None
    choice_TE: Tensor | None = None
    kept_TK: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    # What a fused router knows of the plan of this very choice (`moetk.kernels.sort_plan.Known`).
    # No field: replace and pytrees, which make another routing of this one, leave it out. Ids that
    # are written to are planned anew, unless torch does not see it (.data, a collective).
    known: ClassVar[Any] = None


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """Each expert names its tokens.

    tokens_EC: int64 ids of tokens in [0, num_tokens), -1 = empty place. Per sequence, concatenated:
        C = sequences x capacity of one sequence.
    weights_EC: floating, 0 where the place is empty.
    num_tokens: T.
    """

    tokens_EC: Tensor
    weights_EC: Tensor
    num_tokens: int
    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.tokens_EC.shape[0]


@dataclass(frozen=True, eq=False)
class SoftChoice:
    """Every token mixes into every slot of its own sequence (arXiv 2308.00951).

    dispatch_BSP: columns (over S) sum to one. combine_BSP: rows (over P) sum to one.
    P = num_experts x slots of one expert, expert-major. Kept per sequence: over the flattened T,
    one sequence would leak into another.
    """

    dispatch_BSP: Tensor
    combine_BSP: Tensor
    num_experts: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)


Routing: TypeAlias = TokenChoice | ExpertChoice | SoftChoice


def register_value(cls: type) -> None:
    """Register a frozen dataclass as a pytree whose leaves are its fields."""
    names = [f.name for f in fields(cls)]

    def flatten(value: Any) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    def unflatten(leaves: Any, _: Any) -> Any:
        return cls(*leaves)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(_pytree.GetAttrKey(name), getattr(value, name)) for name in names], None

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


for _cls in (TokenChoice, ExpertChoice, SoftChoice):
    register_value(_cls)


def need(routing: Routing, name: str, reader: str) -> Tensor:
    """The field `name` (or the extra of that name); the error says who reads it.

    Raises MissingFieldError when the router left it out.
    """
    value = getattr(routing, name, None)
    if value is None:
        value = routing.extras.get(name)
    if value is None:
        raise MissingFieldError(
            f"{reader} reads {name}, which this {type(routing).__name__} does not carry: its "
            f"router left it out. Return it from the router, as {name}=... or in extras."
        )
    return value


def keep_fields(routing: Routing, names: frozenset[str]) -> Routing:
    """The routing without the (T, E) tensors that nobody reads, so that they can be freed."""
    drop: dict[str, Any] = {
        name: None
        for name in ("logits_TE", "scores_TE", "choice_TE")
        if name not in names and getattr(routing, name, None) is not None
    }
    return replace(routing, **drop) if drop else routing


def detached(routing: Routing, names: frozenset[str] | None = None) -> Routing:
    """A copy without graph. `names`: the optional fields to keep, None = all of them."""
    if names is not None:
        routing = keep_fields(routing, names)
        if routing.extras and "extras" not in names:
            routing = replace(routing, extras={})
    changes: dict[str, Any] = {}
    for f in fields(routing):
        value = getattr(routing, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = value.detach()
        elif f.name == "extras":
            changes[f.name] = {key: tensor.detach() for key, tensor in value.items()}
    return replace(routing, **changes)


def check_routing(
    routing: Any,
    num_tokens: int,
    num_experts: int,
    *,
    where: object,
    duplicates: bool = False,
    trusted: bool = False,
    values: bool | None = None,
    batch_shape: tuple[int, int] | None = None,
) -> None:
    """Raise unless `routing` is what a router may return for `num_tokens` rows.

    num_experts: experts of the bank, special ones included; 0 = not known, not compared.
    where: named in every message, "CosineRouter in model.layers.3.mlp".
    duplicates: the router declares that one token may name one expert twice (hash tables).
    trusted: the ids come from moetk's own selection; only the weights' finiteness is looked at.
    values: look at the values too. None = on the CPU outside torch.compile, where that costs no
        wait; elsewhere shapes and dtypes only.
    batch_shape: (B, S), what a SoftChoice is compared with.

    Raises MoeShapeError, MoeDtypeError, ExpertIndexError, DuplicateExpertError,
    RoutingWeightError, NonFiniteRoutingError.
    """
    if trusted and isinstance(routing, TokenChoice):
        if _looks_at_values(values, routing.weights_TK):
            _check_finite(routing.weights_TK, where)
    elif isinstance(routing, TokenChoice):
        _check_token_choice(routing, num_tokens, num_experts, where, duplicates, values)
    elif isinstance(routing, ExpertChoice):
        _check_expert_choice(routing, num_tokens, num_experts, where, values)
    elif isinstance(routing, SoftChoice):
        _check_soft_choice(routing, num_tokens, num_experts, where, batch_shape)
    else:
        raise MoeDtypeError(
            f"{where} returned {type(routing).__name__}; a router returns a TokenChoice, an "
            "ExpertChoice or a SoftChoice."
        )


def _looks_at_values(values: bool | None, tensor: Tensor) -> bool:
    asked = tensor.device.type == "cpu" if values is None else values
    return asked and not torch.compiler.is_compiling() and not tensor.is_meta


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_count(got: int, num_experts: int, where: object) -> None:
    if num_experts and got != num_experts:
        raise MoeShapeError(
            f"{where}: num_experts={got} in the routing, but the bank has {num_experts} experts."
        )


def _check_dtypes(
    ids: Tensor, weights: Tensor, id_name: str, weight_name: str, where: object
) -> None:
    if ids.dtype != torch.int64:
        raise MoeDtypeError(f"{where}: {id_name} is {ids.dtype}; ids are torch.int64.")
    if not weights.dtype.is_floating_point:
        raise MoeDtypeError(f"{where}: {weight_name} is {weights.dtype}; weights are floating.")


def _check_token_choice(
    routing: TokenChoice,
    num_tokens: int,
    num_experts: int,
    where: object,
    duplicates: bool,
    values: bool | None,
) -> None:
    ids, weights = routing.experts_TK, routing.weights_TK
    if ids.ndim != 2 or ids.shape[0] != num_tokens:
        raise MoeShapeError(
            f"{where}: experts_TK is {_shape(ids)}, expected (T={num_tokens}, K): one row a token."
        )
    if weights.shape != ids.shape:
        raise MoeShapeError(f"{where}: weights_TK is {_shape(weights)}, experts_TK {_shape(ids)}.")
    _check_count(routing.num_experts, num_experts, where)
    for name in ("logits_TE", "scores_TE", "choice_TE"):
        tensor = getattr(routing, name)
        if tensor is not None and tuple(tensor.shape) != (num_tokens, routing.num_experts):
            raise MoeShapeError(
                f"{where}: {name} is {_shape(tensor)}, expected "
                f"(T={num_tokens}, E={routing.num_experts})."
            )
    kept = routing.kept_TK
    if kept is not None and (kept.shape != ids.shape or kept.dtype != torch.bool):
        raise MoeShapeError(
            f"{where}: kept_TK is {kept.dtype} {_shape(kept)}, expected torch.bool {_shape(ids)}."
        )
    _check_dtypes(ids, weights, "experts_TK", "weights_TK", where)
    if not _looks_at_values(values, ids) or ids.numel() == 0:
        return

    low, high = torch.aminmax(ids)
    if int(low) < -1 or int(high) >= routing.num_experts:
        token, column = _first((ids < -1) | (ids >= routing.num_experts))
        raise ExpertIndexError(
            f"{where}: experts_TK has id {int(ids[token, column])} at token {token}, column "
            f"{column}, but there are {routing.num_experts} experts "
            f"(0..{routing.num_experts - 1}; -1 = unused)."
        )
    _check_finite(weights, where)
    if int(low) < 0:
        loose = (ids < 0) & (weights != 0)
        if bool(loose.any()):
            token, column = _first(loose)
            raise RoutingWeightError(
                f"{where}: experts_TK is -1 at token {token}, column {column}, with weight "
                f"{float(weights[token, column]):.4g}; an unused slot has weight 0."
            )
    if kept is not None:
        loose = ~kept & (weights != 0)
        if bool(loose.any()):
            token, column = _first(loose)
            raise RoutingWeightError(
                f"{where}: kept_TK drops token {token}, column {column}, whose weight is "
                f"{float(weights[token, column]):.4g}; a dropped choice has weight 0."
            )
    if not duplicates and ids.shape[1] > 1:
        ordered = ids.sort(-1).values
        same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(same.any()):
            token, _ = _first(same)
            raise DuplicateExpertError(
                f"{where}: token {token} names an expert twice, {ids[token].tolist()}. A router "
                "that means it (a hash table) declares `duplicates = True`; both then count."
            )


def _check_finite(weights: Tensor, where: object) -> None:
    # The sum first: one number says for all that they are finite.
    finite = bool(torch.isfinite(weights.detach().sum()))
    if not finite and not bool(torch.isfinite(weights).all()):
        bad = ~torch.isfinite(weights)
        token, column = _first(bad)
        raise NonFiniteRoutingError(
            f"{where}: weights_TK has {int(bad.sum())} values that are not finite, the first "
            f"({float(weights[token, column])}) at token {token}, column {column}: the input or "
            "the router's weights hold NaN or infinity. check=False lets such rows through."
        )


def _check_expert_choice(
    routing: ExpertChoice, num_tokens: int, num_experts: int, where: object, values: bool | None
) -> None:
    ids, weights = routing.tokens_EC, routing.weights_EC
    if ids.ndim != 2 or weights.shape != ids.shape:
        raise MoeShapeError(
            f"{where}: tokens_EC is {_shape(ids)} and weights_EC {_shape(weights)}; both are "
            "(E, C)."
        )
    if routing.num_tokens != num_tokens:
        raise MoeShapeError(f"{where}: num_tokens={routing.num_tokens}, but x_TH has {num_tokens}.")
    _check_count(routing.num_experts, num_experts, where)
    _check_dtypes(ids, weights, "tokens_EC", "weights_EC", where)
    if not _looks_at_values(values, ids) or ids.numel() == 0:
        return
    bad = (ids < -1) | (ids >= num_tokens)
    if bool(bad.any()):
        expert, place = _first(bad)
        raise ExpertIndexError(
            f"{where}: tokens_EC has token {int(ids[expert, place])} for expert {expert}, place "
            f"{place}, but there are {num_tokens} tokens (0..{num_tokens - 1}; -1 = empty)."
        )
    if not bool(torch.isfinite(weights).all()):
        expert, place = _first(~torch.isfinite(weights))
        raise NonFiniteRoutingError(
            f"{where}: weights_EC is not finite at expert {expert}, place {place}."
        )
    loose = (ids < 0) & (weights != 0)
    if bool(loose.any()):
        expert, place = _first(loose)
        raise RoutingWeightError(
            f"{where}: tokens_EC is -1 at expert {expert}, place {place}, with weight "
            f"{float(weights[expert, place]):.4g}; an empty place has weight 0."
        )


def _check_soft_choice(
    routing: SoftChoice,
    num_tokens: int,
    num_experts: int,
    where: object,
    batch_shape: tuple[int, int] | None,
) -> None:
    dispatch, combine = routing.dispatch_BSP, routing.combine_BSP
    if dispatch.ndim != 3 or combine.shape != dispatch.shape:
        raise MoeShapeError(
            f"{where}: dispatch_BSP is {_shape(dispatch)} and combine_BSP {_shape(combine)}; both "
            "are (B, S, P)."
        )
    if dispatch.shape[0] * dispatch.shape[1] != num_tokens:
        raise MoeShapeError(
            f"{where}: dispatch_BSP is {_shape(dispatch)}, which is not T={num_tokens} tokens."
        )
    if batch_shape is not None and tuple(dispatch.shape[:2]) != tuple(batch_shape):
        raise MoeShapeError(
            f"{where}: dispatch_BSP is {_shape(dispatch)}, the batch is {tuple(batch_shape)}."
        )
    _check_count(routing.num_experts, num_experts, where)
    if dispatch.shape[2] % routing.num_experts:
        raise MoeShapeError(
            f"{where}: P={dispatch.shape[2]} slots do not divide over {routing.num_experts} "
            "experts."
        )


def _first(mask: Tensor) -> tuple[int, int]:
    row, column = mask.nonzero()[0].tolist()
    return row, column
