"""The other kinds of routing, which a bank serves or refuses: experts that choose, and slots.

Any exception is a refusal, since nobody trains on it unawares; UnsupportedRoutingError is the good
way, whose words say what to do.

Notation: x_TH rows, g_TH cotangent; tokens_EC, weights_EC of an ExpertChoice; dispatch_BSP,
combine_BSP of a SoftChoice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice
from moetk.testing.law import Case
from moetk.testing.laws.banks_law import law
from moetk.testing.laws.banks_routing import RightBank
from moetk.testing.laws.banks_subject import (
    BankUnderTest,
    agree,
    agree_all,
    bank_under_test,
    cotangent,
    needs_output_scale,
    results,
)
from moetk.testing.strategies.routings import (
    TOKENS,
    expert_choice,
    generator,
    normal,
    rows,
    seeds,
    soft_choice,
)


def _refuses(subject: BankUnderTest, routing: Routing) -> str | None:
    kind = type(routing).__name__
    x_TH = torch.zeros(_rows_of(routing), subject.hidden_size, dtype=subject.dtype)
    try:
        subject(x_TH, routing)
    except Exception as error:
        return f"it refuses the {kind} that it was tried on: {type(error).__name__}"
    return None


def _rows_of(routing: Routing) -> int:
    if isinstance(routing, SoftChoice):
        return routing.dispatch_BSP.shape[0] * routing.dispatch_BSP.shape[1]
    assert isinstance(routing, ExpertChoice)
    return routing.num_tokens


def _takes_expert_choice(subject: BankUnderTest) -> str | None:
    if subject.num_experts != subject.real_experts:
        return "special experts take tokens that choose them"
    return _refuses(subject, expert_choice(2, subject.num_experts, 1, generator(0), subject.dtype))


@st.composite
def _expert_choice_rows(draw: DrawFn, subject: BankUnderTest) -> Case:
    num_tokens, seed = draw(st.sampled_from(TOKENS)), draw(seeds())
    capacity, source = draw(st.integers(0, num_tokens)), generator(seed)
    routing = expert_choice(num_tokens, subject.num_experts, capacity, source, subject.dtype)
    return Case(
        {
            "x_TH": rows(num_tokens, subject.hidden_size, "gaussian", source, subject.dtype),
            "g_TH": normal((num_tokens, subject.hidden_size), source, subject.dtype),
            "tokens_EC": routing.tokens_EC,
            "weights_EC": routing.weights_EC,
        },
        {"seed": seed},
    )


class _OneExpertAToken(RightBank):
    """Writes the rows of an ExpertChoice back with index_copy: a token that two experts took keeps
    one output."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if isinstance(routing, ExpertChoice):
            tokens_EC = routing.tokens_EC
            flat_N = tokens_EC.flatten()
            later_N = (flat_N[:, None] == flat_N[None, :]).triu(1).any(-1)
            routing = replace(
                routing, tokens_EC=tokens_EC.masked_fill(later_N.view(tokens_EC.shape), -1)
            )
        return super().forward(x_TH, routing)


@law(
    "B9",
    "experts that choose tokens are tokens that choose experts",
    formula="y(tokens_EC, weights_EC) = y of the TokenChoice of the same pairs; -1 adds nothing",
    source="arXiv 2202.09368, section 3.2",
    cases=_expert_choice_rows,
    broken=lambda: bank_under_test(_OneExpertAToken()),
    unless=_takes_expert_choice,
)
def expert_choice_is_its_transpose(subject: BankUnderTest, case: Case) -> None:
    x_TH, tokens_EC = case["x_TH"], case["tokens_EC"]
    num_experts, num_tokens = len(tokens_EC), len(x_TH)
    routing = ExpertChoice(tokens_EC, case["weights_EC"], num_tokens)
    g_TH = cotangent(subject, x_TH, routing, case["g_TH"])
    # Column e of the transpose: expert e where it took the token, with the weight it has there.
    took_TEC = tokens_EC == torch.arange(num_tokens)[:, None, None]
    experts_TE = torch.where(took_TEC.any(-1), torch.arange(num_experts), -1)
    weights_TE = (took_TEC * routing.weights_EC).sum(-1)
    found = results(subject, x_TH, routing, g_TH)
    want = results(subject, x_TH, TokenChoice(experts_TE, weights_TE, num_experts), g_TH)
    dw_TE = want.pop("d weights_TK")
    want["d weights_EC"] = (took_TEC * dw_TE[..., None]).sum(0)
    size = tokens_EC.numel() + 1
    agree_all(subject, found, want, num_rows=size, because="ExpertChoice against TokenChoice")


def _takes_soft_choice(subject: BankUnderTest) -> str | None:
    if subject.num_experts != subject.real_experts:
        return "special experts take tokens that choose them"
    if subject.scale != "output":
        return needs_output_scale(subject)
    return _refuses(subject, soft_choice(1, 2, subject.num_experts, 1, generator(0), subject.dtype))


@st.composite
def _soft_choice_rows(draw: DrawFn, subject: BankUnderTest) -> Case:
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 4, 0)))
    slots, seed = draw(st.integers(1, 2)), draw(seeds())
    source, hidden = generator(seed), subject.hidden_size
    routing = soft_choice(batch, length, subject.num_experts, slots, source, subject.dtype)
    return Case(
        {
            "x_TH": rows(batch * length, hidden, "gaussian", source, subject.dtype),
            "g_TH": normal((batch * length, hidden), source, subject.dtype),
            "dispatch_BSP": routing.dispatch_BSP,
            "combine_BSP": routing.combine_BSP,
        },
        {"seed": seed},
    )


class _MixesSequences(RightBank):
    """Forgets the batch: all sequences of it share one set of slots."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if isinstance(routing, SoftChoice):
            routing = replace(
                routing,
                dispatch_BSP=routing.dispatch_BSP.flatten(0, 1)[None],
                combine_BSP=routing.combine_BSP.flatten(0, 1)[None],
            )
        return super().forward(x_TH, routing)


@law(
    "B10",
    "slots are rows of their expert, and of their sequence",
    formula="Y_b = C_b f(D_b' X_b), slot p at expert p // (P / E)",
    source="arXiv 2308.00951, algorithm 1",
    cases=_soft_choice_rows,
    broken=lambda: bank_under_test(_MixesSequences()),
    unless=_takes_soft_choice,
)
def soft_choice_is_a_bank_of_slots(subject: BankUnderTest, case: Case) -> None:
    x_TH, dispatch_BSP, combine_BSP = case["x_TH"], case["dispatch_BSP"], case["combine_BSP"]
    batch, length, num_slots = dispatch_BSP.shape
    routing = SoftChoice(dispatch_BSP, combine_BSP, subject.num_experts)
    found = subject(x_TH, routing).detach()
    x_BSH = x_TH.view(batch, length, subject.hidden_size)
    slots_BPH = torch.einsum("bsp,bsh->bph", dispatch_BSP, x_BSH)
    expert_P = torch.arange(num_slots) // (num_slots // subject.num_experts)
    experts_N1 = expert_P.repeat(batch)[:, None]
    of_slot = TokenChoice(
        experts_N1, torch.ones(experts_N1.shape, dtype=x_TH.dtype), subject.num_experts
    )
    out_BPH = subject(slots_BPH.flatten(0, 1), of_slot).detach().view_as(slots_BPH)
    want = torch.einsum("bsp,bph->bsh", combine_BSP, out_BPH).reshape(x_TH.shape)
    size = out_BPH.norm() * max(1, length)  # what the softmax weights add up, which cancels
    agree(subject, found, want, "y_TH of a SoftChoice", num_rows=length * num_slots, size=size)


LAWS = (expert_choice_is_its_transpose, soft_choice_is_a_bank_of_slots)
