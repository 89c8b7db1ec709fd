"""Banks and routings that are drawn, and the dense sum over all experts that defines a bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moetk import ExpertChoice, SoftChoice, TokenChoice
from moetk.experts import (
    Activation,
    BankSpec,
    BankWeights,
    ClampedGated,
    Gated,
    GptOssGated,
    Plain,
)
from moetk.routing import Routing

PATTERNS = ["random", "skewed", "duplicates", "unused", "dropped"]

# The twin: written out again, from the formulas alone.
FORMULAS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    Gated(): lambda gate, up: gate * gate.sigmoid() * up,
    ClampedGated(0.4): lambda gate, up: (
        gate.clamp(max=0.4) * gate.clamp(max=0.4).sigmoid() * up.clamp(-0.4, 0.4)
    ),
    GptOssGated(1.7, 0.5): lambda gate, up: (
        (up.clamp(-0.5, 0.5) + 1) * gate.clamp(max=0.5) * (1.7 * gate.clamp(max=0.5)).sigmoid()
    ),
    Plain(): lambda hidden, _: hidden * (hidden > 0),
}


def dense_mlp(spec: BankSpec, weights: BankWeights, x_TEH: Tensor) -> Tensor:
    """Every expert on its own row of each token: (T, E, H) -> (T, E, H)."""
    up, down = ("ehj", "eih") if spec.transposed else ("ejh", "ehi")
    hidden_TEJ = torch.einsum(f"teh,{up}->tej", x_TEH, weights.up)
    if weights.up_bias is not None:
        hidden_TEJ = hidden_TEJ + weights.up_bias
    if not spec.gated:
        gate, linear = hidden_TEJ, hidden_TEJ
    elif spec.interleaved:
        gate, linear = hidden_TEJ.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        gate, linear = hidden_TEJ.unflatten(-1, (2, -1)).unbind(-2)
    y_TEH = torch.einsum(f"tei,{down}->teh", FORMULAS[spec.activation](gate, linear), weights.down)
    return y_TEH if weights.down_bias is None else y_TEH + weights.down_bias


def dense(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing) -> Tensor:
    """All experts on all tokens, then only what was chosen."""
    experts = range(spec.num_experts)
    if isinstance(routing, SoftChoice):
        batch, length, slots = routing.dispatch_BSP.shape
        x_BSH = x_TH.reshape(batch, length, x_TH.shape[1])
        mixed_BPH = torch.einsum("bsp,bsh->bph", routing.dispatch_BSP, x_BSH)
        of_expert = torch.arange(slots) // (slots // routing.num_experts)
        all_NEH = mixed_BPH.reshape(-1, 1, x_TH.shape[1]).expand(-1, spec.num_experts, -1)
        y_NEH = dense_mlp(spec, weights, all_NEH)
        y_NH = y_NEH[torch.arange(len(y_NEH)), of_expert.repeat(batch)]
        y_BPH = y_NH.reshape(batch, slots, x_TH.shape[1])
        return torch.einsum("bsp,bph->bsh", routing.combine_BSP, y_BPH).reshape(x_TH.shape)
    y_TH = x_TH * 0.0
    for chosen_T, weight_T in choices(routing, len(x_TH)):
        x_TEH = x_TH[:, None].expand(-1, spec.num_experts, -1)
        if spec.scale == "input":
            y_TEH = dense_mlp(spec, weights, x_TEH * weight_T[:, None, None])
            weight_T = torch.ones_like(weight_T)
        else:
            y_TEH = dense_mlp(spec, weights, x_TEH)
        for expert in experts:
            y_TH = (
                y_TH
                + torch.where((chosen_T == expert)[:, None], y_TEH[:, expert], 0)
                * (weight_T[:, None])
            )
        for offset, kind in enumerate(spec.special):
            if kind == "copy":
                here_T1 = (chosen_T == spec.num_experts + offset)[:, None]
                y_TH = y_TH + torch.where(here_T1, x_TH * weight_T[:, None], 0)
    return y_TH


def choices(routing: TokenChoice | ExpertChoice, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(expert or -1, weight) of each token, one pair a choice."""
    if isinstance(routing, TokenChoice):
        ids_TK = routing.experts_TK
        if routing.kept_TK is not None:
            ids_TK = ids_TK.masked_fill(~routing.kept_TK, -1)
        return list(zip(ids_TK.unbind(1), routing.weights_TK.unbind(1), strict=True))
    found = []
    for expert in range(routing.num_experts):
        for place in range(routing.tokens_EC.shape[1]):
            here_T = torch.arange(num_tokens) == routing.tokens_EC[expert, place]
            weight_T = torch.where(here_T, routing.weights_EC[expert, place], 0)
            found.append((torch.where(here_T, expert, -1), weight_T))
    return found


# What is drawn: sizes and settings; tensors come from a drawn seed.


def make_weights(spec: BankSpec, bias: bool, dtype: torch.dtype = torch.float64) -> BankWeights:
    E, H, I, J = spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.up_width
    up, down = torch.randn(E, J, H), torch.randn(E, H, I)
    if spec.transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = (torch.randn(E, J), torch.randn(E, H)) if bias else (None, None)
    made = [
        None if t is None else (t * 0.5).to(dtype).requires_grad_() for t in (up, down, *biases)
    ]
    return BankWeights(*made)  # type: ignore[arg-type]


def token_choice(tokens: int, experts: int, k: int, pattern: str) -> TokenChoice:
    if pattern == "skewed":
        ids_TK = torch.arange(k).expand(tokens, k).clone()
    elif pattern == "duplicates":
        ids_TK = torch.randint(experts, (tokens, k))
    else:
        ids_TK = torch.rand(tokens, experts).argsort(-1)[:, :k]
    weights_TK, kept_TK = torch.randn(tokens, k, dtype=torch.float64), None
    if pattern == "unused":
        ids_TK = ids_TK.masked_fill(torch.rand(tokens, k) < 0.4, -1)
        weights_TK = weights_TK.masked_fill(ids_TK < 0, 0)
    elif pattern == "dropped":
        kept_TK = torch.rand(tokens, k) < 0.5
        weights_TK = weights_TK.masked_fill(~kept_TK, 0)
    return TokenChoice(ids_TK, weights_TK.requires_grad_(), experts, kept_TK=kept_TK)


def expert_choice(tokens: int, experts: int, capacity: int) -> ExpertChoice:
    capacity = min(capacity, tokens)
    ids_EC = torch.rand(experts, tokens).argsort(-1)[:, :capacity]
    ids_EC = ids_EC.masked_fill(torch.rand(ids_EC.shape) < 0.3, -1)
    weights_EC = torch.randn(ids_EC.shape, dtype=torch.float64).masked_fill(ids_EC < 0, 0)
    return ExpertChoice(ids_EC, weights_EC.requires_grad_(), tokens)


def soft_choice(batch: int, length: int, experts: int, slots: int) -> SoftChoice:
    logits_BSP = torch.randn(batch, length, experts * slots, dtype=torch.float64)
    dispatch_BSP = logits_BSP.softmax(1).requires_grad_()
    return SoftChoice(dispatch_BSP, logits_BSP.softmax(2).detach().requires_grad_(), experts)


@st.composite
def banks(draw: st.DrawFn, **fixed: Any) -> tuple[BankSpec, BankWeights]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    settings_ = {
        "activation": draw(st.sampled_from(list(FORMULAS))),
        "transposed": draw(st.booleans()),
        "interleaved": draw(st.booleans()),
        "scale": draw(st.sampled_from(["output", "input"])),
        **fixed,
    }
    sizes = (
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from([1, 4, 8])),
        draw(st.sampled_from([1, 3, 4])),
    )
    spec = BankSpec(*sizes, **settings_)
    return spec, make_weights(spec, draw(st.booleans()))


def gradients(
    y_TH: Tensor, weights: BankWeights, x_TH: Tensor, routing: Routing
) -> dict[str, Tensor]:
    """Of a fixed cotangent, by name; the output too."""
    leaves = {"x": x_TH}
    for owner in (weights, routing):
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and value.requires_grad:
                leaves[name] = value
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(y_TH.shape, generator=generator, dtype=torch.float64).to(y_TH.dtype)
    found = torch.autograd.grad(y_TH, list(leaves.values()), cotangent, materialize_grads=True)
    return {"y": y_TH.detach(), **dict(zip(leaves, found, strict=True))}


def rows(tokens: int, hidden: int) -> Tensor:
    return torch.randn(tokens, hidden, dtype=torch.float64).requires_grad_()


def a_case(
    spec: BankSpec, tokens: int = 12, pattern: str = "random", dtype: torch.dtype = torch.float64
) -> tuple[BankWeights, Tensor, TokenChoice]:
    """Weights with biases, rows and a routing."""
    torch.manual_seed(0)
    weights = make_weights(spec, True, dtype)
    x_TH = torch.randn(tokens, spec.hidden_size).to(dtype).requires_grad_()
    return weights, x_TH, token_choice(tokens, spec.num_experts, 2, pattern)
