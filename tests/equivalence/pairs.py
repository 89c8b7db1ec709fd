"""Pairs that state the same function in different ways: nothing of them may be called a difference.

A pair is drawn from a seed: a way to differ, sizes, a router, a dtype, and an input with or
without exact ties. The ways are backends, layouts, chunks, token order, slot order, equal formulas
and Transformers' own implementations.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moetk import MoELayer, RouterContext, TokenChoice
from moetk.dispatch import Capacity, Local
from moetk.equivalence.stored import load_trace
from moetk.experts import BankSpec, ClampedGated, ExpertBank, Gated, GptOssGated
from moetk.layers.find import find_blocks
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4Router,
    GptOssRouter,
    MixtralRouter,
    SwitchRouter,
    gather,
    top_k,
)
from tests.layers.stock import replaced, stock
from tests.layers.versions import DTYPES as WRITTEN
from tests.layers.versions import VERSIONS, block_of, path_of
from tests.tiny import EXTRA, FAMILIES, H

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Pair:
    """seed names the pair; way says how the two differ; both state one function of x."""

    seed: int
    way: str
    a: Any
    b: Any
    x: Tensor
    ctx: RouterContext | None
    ties: bool


class Chunked(nn.Module):
    """A bank that takes its tokens in pieces."""

    def __init__(self, bank: nn.Module, pieces: int) -> None:
        super().__init__()
        self.bank, self.pieces = bank, pieces
        self.num_experts = bank.num_experts

    def forward(self, x_TH: Tensor, routing: TokenChoice) -> Tensor:
        cuts = torch.arange(len(x_TH)).tensor_split(self.pieces)
        return torch.cat([self.bank(x_TH[rows], _rows(routing, rows)) for rows in cuts])


class Shuffled(nn.Module):
    """A bank that takes its tokens in another order, and its slots backwards."""

    def __init__(self, bank: nn.Module, seed: int, slots: bool) -> None:
        super().__init__()
        self.bank, self.seed, self.slots = bank, seed, slots
        self.num_experts = bank.num_experts

    def forward(self, x_TH: Tensor, routing: TokenChoice) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(x_TH), generator=generator)
        moved = _rows(routing, rows)
        if self.slots:
            moved = TokenChoice(
                moved.experts_TK.flip(1),
                moved.weights_TK.flip(1),
                moved.num_experts,
                kept_TK=None if moved.kept_TK is None else moved.kept_TK.flip(1),
            )
        return self.bank(x_TH[rows], moved)[rows.argsort()]


def _rows(routing: TokenChoice, rows: Tensor) -> TokenChoice:
    kept = routing.kept_TK
    return TokenChoice(
        routing.experts_TK[rows],
        routing.weights_TK[rows],
        routing.num_experts,
        kept_TK=None if kept is None else kept[rows],
    )


class Einsum(nn.Module):
    """Every expert on every token, and a mask: the plain statement of a gated bank."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = bank.gate_up_proj, bank.down_proj
        self.gate_up_proj_bias, self.down_proj_bias = bank.gate_up_proj_bias, bank.down_proj_bias
        self.spec, self.num_experts = bank.spec, bank.num_experts

    def forward(self, x_TH: Tensor, routing: TokenChoice) -> Tensor:
        mask_TKE = torch.nn.functional.one_hot(
            routing.experts_TK.clamp(min=0), self.num_experts
        ).to(routing.weights_TK.dtype)
        used_TK = routing.experts_TK >= 0
        if routing.kept_TK is not None:
            used_TK = used_TK & routing.kept_TK
        weight_TE = (mask_TKE * (routing.weights_TK * used_TK)[..., None]).sum(1)
        hidden_TEJ = torch.einsum("th,ejh->tej", x_TH, self.gate_up_proj)
        if self.gate_up_proj_bias is not None:
            hidden_TEJ = hidden_TEJ + self.gate_up_proj_bias
        y_TEH = torch.einsum("tei,ehi->teh", self.spec.activate(hidden_TEJ), self.down_proj)
        if self.down_proj_bias is not None:
            y_TEH = y_TEH + self.down_proj_bias
        return (y_TEH * weight_TE[..., None]).sum(1).to(x_TH.dtype)


class MixtralFromKept(MixtralRouter):
    """Softmax of the kept logits: what renormalised softmax scores are."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = self.in_score_dtype(logits_TE).softmax(-1)
        experts_TK = top_k(scores_TE, self.top_k, ctx, self.tie)
        weights_TK = gather(self.in_score_dtype(logits_TE), experts_TK).softmax(-1)
        return TokenChoice(experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE)


class MixtralInChunks(MixtralRouter):
    """The product with the router's matrix in two parts of H."""

    def logits(self, x_TH: Tensor) -> Tensor:
        half = x_TH.shape[1] // 2
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        x, w = x_TH.to(wide), self.weight.to(wide)
        return (x[:, :half] @ w[:, :half].T + x[:, half:] @ w[:, half:].T).to(x_TH.dtype)


class V3FromExp(DeepSeekV3Router):
    """The sigmoid written out, and the bias added from a copy."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = 1 / (1 + (-self.in_score_dtype(logits_TE)).exp())
        size = self.num_experts // self.groups
        biased_TE = scores_TE + self.e_score_correction_bias
        grouped_TGM = biased_TE.unflatten(-1, (self.groups, size))
        best_TG = grouped_TGM.topk(min(2, size), -1).values.sum(-1)
        keep_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        order_TG = best_TG.argsort(dim=-1, descending=True, stable=True)
        keep_TG.scatter_(1, order_TG[:, : self.top_groups], True)
        # A large negative number instead of -inf, as some implementations mask.
        choice_TE = grouped_TGM.masked_fill(~keep_TG[..., None], -1e30).flatten(1)
        experts_TK = ctx.replayed(
            choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        )
        weights_TK = gather(scores_TE, experts_TK)
        if self.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + self.eps)
        return TokenChoice(
            experts_TK, weights_TK * self.scale, self.num_experts, logits_TE, scores_TE, choice_TE
        )


def draw_pair(seed: int) -> Pair:
    """The pair of a seed: ways take turns, so that each has its share."""
    way = WAYS[seed % len(WAYS)]
    return way(seed, random.Random(seed))


def _sizes(rng: random.Random) -> tuple[int, int, int, int]:
    experts = rng.choice([2, 4, 8, 16])
    choices = rng.randint(1, min(4, experts))
    return 16 * rng.choice([1, 2]), experts, 8 * rng.choice([1, 2, 3]), choices


def _input(seed: int, hidden: int, dtype: torch.dtype, ties: bool) -> Tensor:
    """(B, S, H); with ties, a quarter of the tokens is zero: all their logits are equal."""
    generator = torch.Generator().manual_seed(seed)
    x_BSH = torch.randn(2, 12, hidden, generator=generator)
    if ties:
        x_BSH[:, ::4] = 0
        x_BSH[:, 1] = x_BSH[:, 2]
    return x_BSH.to(dtype)


def _parts(seed: int, rng: random.Random) -> tuple[MoELayer, Tensor, torch.dtype, bool]:
    hidden, experts, inner, choices = _sizes(rng)
    dtype, ties = rng.choice(DTYPES), rng.random() < 0.5
    torch.manual_seed(seed)
    router: nn.Module
    kind = rng.choice(["mixtral", "v3", "v4", "gpt_oss", "switch"])
    if kind == "mixtral":
        router = MixtralRouter(hidden, experts, choices, renormalise=rng.random() < 0.7)
    elif kind == "v3":
        groups = 2 if experts >= 4 else 1
        choices = min(choices, experts // groups)
        router = DeepSeekV3Router(
            hidden, experts, choices, groups=groups, top_groups=1, scale=rng.choice([1.0, 2.5])
        )
        router.e_score_correction_bias.uniform_(-0.2, 0.2)
    elif kind == "v4":
        router = DeepSeekV4Router(hidden, experts, choices, scale=1.5)
    elif kind == "gpt_oss":
        router = GptOssRouter(hidden, experts, choices)
    else:
        router = SwitchRouter(hidden, experts)
    activation = rng.choice([Gated(), ClampedGated(0.5), GptOssGated(limit=0.5)])
    bank = ExpertBank(
        hidden,
        experts,
        inner,
        spec=BankSpec(experts, hidden, inner, activation=activation),
        bias=rng.random() < 0.4,
        backend="reference",
    )
    layer = MoELayer(router, bank, dispatcher=rng.choice([None, Local(Capacity(1.25))]))
    return layer.to(dtype), _input(seed, hidden, dtype, ties), dtype, ties


def _with_experts(layer: MoELayer, change: Callable[[ExpertBank], nn.Module]) -> MoELayer:
    other = copy.deepcopy(layer)
    other.experts = change(other.experts)
    return other


def _grouped(bank: ExpertBank) -> ExpertBank:
    bank.backend = "grouped"
    return bank


def _backend(seed: int, rng: random.Random) -> Pair:
    layer, x, _, ties = _parts(seed, rng)
    other = copy.deepcopy(layer)
    other.experts.backend = "grouped"
    return Pair(seed, "backend", layer, other, x, None, ties)


def relaid(bank: ExpertBank, *, transposed: bool, interleaved: bool) -> ExpertBank:
    """The same experts stored in another layout."""
    spec = replace(bank.spec, transposed=transposed, interleaved=interleaved)
    new = ExpertBank(
        spec.hidden_size,
        spec.num_experts,
        spec.intermediate_size,
        spec=spec,
        bias=bank.gate_up_proj_bias is not None,
        backend=bank.backend,
    ).to(bank.gate_up_proj.dtype)

    def rows(x: Tensor) -> Tensor:  # (E, J, ...) gate rows first -> the new order of J
        return torch.stack(x.chunk(2, 1), 2).flatten(1, 2) if interleaved else x

    with torch.no_grad():
        up, down = rows(bank.gate_up_proj), bank.down_proj
        new.gate_up_proj.copy_(up.mT if transposed else up)
        new.down_proj.copy_(down.mT if transposed else down)
        if bank.gate_up_proj_bias is not None:
            new.gate_up_proj_bias.copy_(rows(bank.gate_up_proj_bias))
            new.down_proj_bias.copy_(bank.down_proj_bias)
    return new


def _layout(seed: int, rng: random.Random) -> Pair:
    layer, x, _, ties = _parts(seed, rng)
    transposed, interleaved = rng.choice([(True, False), (False, True), (True, True)])
    other = _with_experts(
        layer, lambda bank: relaid(bank, transposed=transposed, interleaved=interleaved)
    )
    other.experts.backend = "grouped"
    return Pair(seed, "layout", layer, other, x, None, ties)


def _chunking(seed: int, rng: random.Random) -> Pair:
    layer, x, _, ties = _parts(seed, rng)
    base = rng.choice([Einsum, Einsum, Einsum, _grouped])
    other = _with_experts(layer, lambda bank: Chunked(base(bank), rng.choice([2, 3, 24])))
    return Pair(seed, "chunking", layer, other, x, None, ties)


def _token_order(seed: int, rng: random.Random) -> Pair:
    layer, x, _, ties = _parts(seed, rng)
    base, slots = rng.choice([Einsum, Einsum, Einsum, _grouped]), rng.random() < 0.5
    other = _with_experts(layer, lambda bank: Shuffled(base(bank), seed, slots))
    return Pair(seed, "token order", layer, other, x, None, ties)


def _formula(seed: int, rng: random.Random) -> Pair:
    hidden, experts, inner, choices = _sizes(rng)
    dtype, ties = rng.choice(DTYPES), rng.random() < 0.5
    torch.manual_seed(seed)
    bank = ExpertBank(hidden, experts, inner, backend="grouped")
    cls, other_cls = rng.choice(
        [
            (MixtralRouter, MixtralFromKept),
            (MixtralRouter, MixtralInChunks),
            (DeepSeekV3Router, V3FromExp),
        ]
    )
    settings: dict[str, Any] = {"tie": "low"}
    if cls is DeepSeekV3Router and experts >= 4:
        settings |= {"groups": 2, "top_groups": 1}
        choices = min(choices, experts // 2)
    router, other = (c(hidden, experts, choices, **settings) for c in (cls, other_cls))
    if cls is DeepSeekV3Router:
        router.e_score_correction_bias.uniform_(-0.2, 0.2)
    other.load_state_dict(router.state_dict())
    a = MoELayer(router, bank).to(dtype)
    b = MoELayer(other, Einsum(copy.deepcopy(bank)) if rng.random() < 0.5 else bank).to(dtype)
    return Pair(seed, "formula", a, b, _input(seed, hidden, dtype, ties), None, ties)


def _stock(seed: int, rng: random.Random) -> Pair:
    """A v5 block against the same block replaced, or its experts run another way."""
    family = sorted(EXTRA)[seed // len(WAYS) % len(EXTRA)]
    dtype, ties = rng.choice([torch.float32, torch.bfloat16]), rng.random() < 0.5
    model, way = stock(family, dtype), rng.choice(["auto", "reference", "grouped_mm"])
    if way == "grouped_mm":
        other = copy.deepcopy(model)
        other.set_experts_implementation("grouped_mm")
    else:
        other = replaced(model, backend=way)
    blocks = [list(find_blocks(root))[-1].block for root in (model, other)]
    x = _input(seed, H, dtype, ties)
    ctx = RouterContext(token_ids=torch.arange(len(x[0]) * 2) % 96, batch_shape=(2, len(x[0])))
    return Pair(seed, f"transformers' {family}, {way}", blocks[0], blocks[1], x, ctx, ties)


def _version(seed: int, rng: random.Random) -> Pair:
    """What another Transformers computed against this one's block, run by moetk."""
    family = FAMILIES[seed // len(WAYS) % len(FAMILIES)]
    dtype, backend = rng.choice(WRITTEN), rng.choice(["reference", "grouped"])
    block, x, ctx = block_of(family, dtype, backend)
    stored = load_trace(path_of(family, dtype, VERSIONS[0]))
    way = f"transformers' {family}, of another version"
    return Pair(seed, way, stored, block, x, ctx, True)


WAYS = (_backend, _layout, _chunking, _token_order, _formula, _stock, _version)
