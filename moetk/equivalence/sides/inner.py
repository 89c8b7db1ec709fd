"""From overheard products to the stages inside the experts: up, activation, expert_output.

Letters: T tokens, K choices a token, N rows of one product, W the width of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetk.equivalence.sides.products import Place, Product, Products
from moetk.equivalence.sides.rows import Order, choices_of_rows
from moetk.equivalence.trace import Scattered

ROUNDINGS = 8  # units that a token's sum may be off by; an expert that is missing is more of it


@dataclass(frozen=True, eq=False)
class Asked:
    """What the experts were asked: their input, and the choices to compute.

    ids_TK: -1 = not to be computed (unused or dropped).
    """

    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True, eq=False)
class Inner:
    """The stages that could be told with certainty, and the choices that were computed."""

    stages: dict[str, Tensor | Scattered]
    computed_TK: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Piece:
    place: Place
    value: Tensor
    choices_N: Tensor


def inner_stages(products: Products, asked: Asked, combined_TH: Tensor) -> Inner:
    """up (T, K, J), all gate columns before all up columns and before its bias; activation
    (T, K, I); expert_output (T, K, H), with its bias and before the routing weight. Rows of zeros
    where nothing was computed.

    A stage is left out where its rows cannot be told for certain; activation and expert_output
    where the experts weigh before their second product, which then has neither.
    """
    bank, made = products.bank, products.made
    if not products.clear or (not made and bool((asked.ids_TK >= 0).any())):
        return Inner({})
    ups = _with_choices(products, asked)
    if ups is None:
        return Inner({})
    downs: list[tuple[Product, Tensor]] = []
    for product in made:
        if product.part == "down":
            before = [c for up, c in ups if up.expert == product.expert and _alike(up, product)]
            if not before:
                return Inner({})
            downs.append((product, before[-1]))
    computed_N = _covered(ups, asked.ids_TK.numel())
    down_N = _covered(downs, asked.ids_TK.numel())
    if computed_N is None or down_N is None or not torch.equal(computed_N, down_N):
        return Inner({})  # of some expert only one product was overheard, or a row twice

    stages: dict[str, Tensor | Scattered] = {
        "up": _scattered(
            [_Piece(_graph_of_up(p), p.value, n) for p, n in ups], asked, bank.up_width,
            bank.together,
        ),
        "activation": _scattered(
            [_Piece(p.left, p.left_value, n) for p, n in downs], asked, bank.width
        ),
    }  # fmt: skip
    outputs = [_output(p, n, bank.down_bias is not None) for p, n in downs]
    pieces = [piece for piece in outputs if piece is not None]
    output = _scattered(pieces, asked, bank.hidden_size)
    computed_TK = computed_N.view(asked.ids_TK.shape)
    some_left_out = bool(((asked.ids_TK >= 0) & ~computed_TK).any())
    if some_left_out and not (len(pieces) == len(downs) and _all_of(output, asked, combined_TH)):
        return Inner({})  # computed where nobody could hear it, for all that is known
    if not bank.scaled and len(pieces) == len(downs):
        if _weighs_after(output, asked, combined_TH):
            stages["expert_output"] = output
        else:
            del stages["activation"]
    return Inner(stages, computed_TK)


def _alike(up: Product, down: Product) -> bool:
    return len(up.value) == len(down.value) and up.offsets == down.offsets


def _with_choices(overheard: Products, asked: Asked) -> list[tuple[Product, Tensor]] | None:
    """Each up product with (N,) the choice of each row, -1 = nobody's; None = it cannot be told."""
    bank, products = overheard.bank, [one for one in overheard.made if one.part == "up"]
    flat_N, num_choices = asked.ids_TK.flatten(), asked.ids_TK.shape[1]
    dtype = products[0].left_value.dtype if products else asked.x_TH.dtype
    if any(p.left_value.shape[1] != asked.x_TH.shape[1] for p in products):
        return None

    def inputs(choices_C: Tensor) -> Tensor:
        rows = asked.x_TH.detach()[choices_C // max(num_choices, 1)]
        if bank.scaled:
            rows = rows * asked.weights_TK.detach().flatten()[choices_C][:, None]
        return rows.to(dtype)

    parts = [
        (rows, (flat_N == expert).nonzero()[:, 0])
        for product in products
        for expert, rows in product.by_expert()
    ]
    grouped = any(product.expert is None for product in products)
    declared: Order | None = "token" if grouped else bank.loop_order
    order_N = overheard.order_of(flat_N) if grouped and len(products) == 1 else None
    sizes = [len(rows) for rows, _ in parts]
    told = None if order_N is None else list(order_N[: sum(sizes)].split(sizes))
    tokens_TH = None if bank.scaled else asked.x_TH.detach().to(dtype)
    found = choices_of_rows(parts, num_choices, inputs, declared, told, tokens_TH)
    if found is None:
        return None
    remaining, ups = iter(found), []
    for product in products:
        choices_N = flat_N.new_full((len(product.value),), -1)
        start = 0
        for _ in product.by_expert():
            choices = next(remaining)
            choices_N[start : start + len(choices)] = choices
            start += len(choices)
        ups.append((product, choices_N))
    return ups


def _covered(parts: Sequence[tuple[Product, Tensor]], total: int) -> Tensor | None:
    """(T * K,) bool: the choices that have a row; None where one has two."""
    device = parts[0][1].device if parts else None
    counts = torch.zeros(total, dtype=torch.int64, device=device)
    for _, choices_N in parts:
        counts += torch.bincount(choices_N[choices_N >= 0], minlength=total)
    return None if bool((counts > 1).any()) else counts > 0


def _graph_of_up(product: Product) -> Place:
    """Where the product's gradient is: itself, or what a bias was added to inside one node."""
    if not product.out.tensor.requires_grad and product.summed is not None:
        return Place(product.summed, product.out.start)
    return product.out


def _output(product: Product, choices_N: Tensor, has_bias: bool) -> _Piece | None:
    if not has_bias:
        return _Piece(product.out, product.value, choices_N)
    if product.summed is None or product.summed_value is None:
        return None
    start = product.out.start
    value = product.summed_value[start : start + len(choices_N)]
    return _Piece(Place(product.summed, start), value, choices_N)


def _scattered(
    pieces: Sequence[_Piece],
    asked: Asked,
    width: int,
    common: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Scattered:
    """The pieces of one stage; several that lie in one tensor become one."""
    nodes: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    rows: dict[int, list[Tensor]] = {}
    for piece in pieces:
        node, start, count = piece.place.tensor, piece.place.start, len(piece.value)
        key = id(node)
        if key not in nodes:
            nodes[key], rows[key] = node, []
            values[key] = piece.value.new_zeros(len(node), piece.value.shape[1])
        values[key][start : start + count] = piece.value
        used = (piece.choices_N >= 0).nonzero()[:, 0]
        rows[key].append(torch.stack([used + start, piece.choices_N[used]]))
    maps = [torch.cat(rows[key], 1) for key in nodes]
    shape = (*asked.ids_TK.shape, width)
    empty = asked.x_TH.detach()

    def place(tensors: Sequence[Tensor]) -> Tensor:
        whole = (tensors[0] if tensors else empty).new_zeros(shape[0] * shape[1], width)
        for tensor, (source, choice) in zip(tensors, maps, strict=True):
            whole[choice] = tensor[source].to(whole.dtype)
        return common(whole).view(shape)

    return Scattered(tuple(nodes.values()), place, tuple(values[key] for key in nodes))


def _weighs_after(output: Scattered, asked: Asked, combined_TH: Tensor) -> bool:
    """The outputs times their weights, and not the outputs alone, are what was combined."""
    before, after = _left_over(output, asked, combined_TH)
    return not before < after


def _all_of(output: Scattered, asked: Asked, combined_TH: Tensor) -> bool:
    """Nothing but these outputs was combined: what is left over is rounding."""
    allowed = ROUNDINGS * torch.finfo(combined_TH.dtype).eps * combined_TH.detach().double().norm()
    return min(_left_over(output, asked, combined_TH)) <= float(allowed)


def _left_over(output: Scattered, asked: Asked, combined_TH: Tensor) -> tuple[float, float]:
    """|sum of the outputs - combined| and |sum of the outputs times their weights - combined|;
    inf where the shapes differ."""
    output_TKH = output.place(output.values or output.pieces).detach().double()
    num_tokens, _, width = output_TKH.shape
    if combined_TH.numel() != num_tokens * width:
        return math.inf, math.inf
    combined = combined_TH.detach().double().reshape(num_tokens, width)
    weights_TK1 = asked.weights_TK.detach().double()[..., None]
    before = output_TKH.sum(1) - combined
    after = (output_TKH * weights_TK1).sum(1) - combined
    return float(before.norm()), float(after.norm())
