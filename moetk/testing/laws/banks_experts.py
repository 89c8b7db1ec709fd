"""What is known of a bank's experts: one row of each parameter, and their special ids."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moetk.experts import (
    BankSpec,
    bank_forward,
)
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case
from moetk.testing.laws.banks_law import law
from moetk.testing.laws.banks_routing import RightBank
from moetk.testing.laws.banks_subject import (
    BankUnderTest,
    agree,
    agree_all,
    bank_under_test,
    first_reason,
    needs_output_scale,
    needs_spec,
    needs_stacked,
    results,
    routed,
    routed_call,
    rows_of,
    weight_names,
)
from moetk.testing.strategies.routings import (
    generator,
    seed_of,
)

# B24


class _ForgetsTheLastExpert(RightBank):
    """Loops over range(num_experts - 1)."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        ids_TK = routing.experts_TK
        served_TK = ids_TK.masked_fill(ids_TK == routing.num_experts - 1, -1)
        return super().forward(x_TH, replace(routing, experts_TK=served_TK))


@law(
    "B24",
    "identical experts are one dense network",
    formula="f_e = f for all e, sum_k w_tk = 1: y = f(x) by any routing",
    source="arXiv 2212.05055: a bank made of copies of one network starts as that network",
    cases=lambda subject: routed(
        subject, patterns=("random", "hot", "duplicates", "starved"), tokens=(2, 5, 9, 1)
    ),
    broken=lambda: bank_under_test(_ForgetsTheLastExpert()),
    unless=first_reason(needs_output_scale, needs_stacked),
)
def identical_experts(subject: BankUnderTest, case: Case) -> None:
    same = {n: t.detach()[:1].expand_as(t).clone() for n, t in subject.per_expert.items()}
    ids_TK = case["experts_TK"] % subject.real_experts
    shares_TK = case["weights_TK"].abs() + 0.1
    shares_TK = shares_TK / shares_TK.sum(-1, keepdim=True)
    ones_T1 = torch.ones_like(shares_TK[:, :1])
    mixed = TokenChoice(ids_TK, shares_TK, subject.num_experts)
    dense = TokenChoice(torch.zeros_like(ids_TK[:, :1]), ones_T1, subject.num_experts)
    agree(
        subject,
        subject(case["x_TH"], mixed, same).detach(),
        subject(case["x_TH"], dense, same).detach(),
        "y of identical experts, mixed against the first one alone",
        num_rows=rows_of(case),
    )


# B25


class _NormalisesOutputs(RightBank):
    """Brings every output to length 1, which a norm behind the layer is there for."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return F.normalize(super().forward(x_TH, routing), dim=-1)


@law(
    "B25",
    "linear in the down projection",
    formula="(W_down, c) scaled by a scales y by a, and dL/dx, dL/dw",
    source="the last map of f_e is affine: arXiv 2002.05202, equation 6",
    cases=lambda subject: routed(subject),
    broken=lambda: bank_under_test(_NormalisesOutputs()),
    unless=first_reason(
        needs_spec,
        lambda subject: (
            "a copy expert adds rows that pass no down projection"
            if subject.spec is not None and "copy" in subject.spec.special
            else None
        ),
    ),
)
def down_scales_output(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    names = weight_names(subject)
    down = [names[which] for which in ("down", "down_bias") if which in names]
    scaled = {name: -3 * subject.parameters[name].detach() for name in down}
    found = results(subject, x_TH, routing, g_TH, scaled)
    want = results(subject, x_TH, routing, g_TH)
    agree_all(
        subject,
        found,
        {name: -3 * want[name] for name in ("y_TH", "d x_TH", "d weights_TK")},
        num_rows=rows_of(case),
        because="down projection times -3",
    )


# B26


class _OneBiasForAll(RightBank):
    """Adds the first expert's output bias to every expert."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        weights = self.weights()
        assert weights.down_bias is not None
        shared = replace(weights, down_bias=weights.down_bias[:1].expand_as(weights.down_bias))
        return bank_forward(self.spec, shared, x_TH, routing)


@law(
    "B26",
    "experts have no names",
    formula="parameters[p] and ids renamed by p: the same y, gradients renamed by p",
    source="a sum over experts has no order; MegaBlocks keeps one output bias for all experts",
    cases=lambda subject: routed(subject),
    broken=lambda: bank_under_test(_OneBiasForAll()),
    unless=needs_stacked,
)
def relabelled_experts(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    real, stacked = subject.real_experts, subject.per_expert
    order_E = torch.randperm(real, generator=generator(seed_of(case)))
    name_E = torch.cat([order_E.argsort(), torch.arange(real, subject.num_experts)])
    moved = {name: tensor.detach()[order_E] for name, tensor in stacked.items()}
    ids_TK = routing.experts_TK
    renamed = replace(routing, experts_TK=torch.where(ids_TK >= 0, name_E[ids_TK.clamp(min=0)], -1))
    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, x_TH, renamed, g_TH, moved)
    want |= {f"d {n}": want[f"d {n}"][order_E] for n in stacked if f"d {n}" in want}
    agree_all(subject, found, want, num_rows=rows_of(case), because="experts renamed")


# B27


class _CopiesInFull(RightBank):
    """A copy expert adds the token itself, whatever weight it was chosen with."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        copies_TK = routing.experts_TK > self.spec.num_experts
        return super().forward(
            x_TH, replace(routing, weights_TK=routing.weights_TK.masked_fill(copies_TK, 1.0))
        )


@law(
    "B27",
    "special experts: zero adds nothing, copy adds the token",
    formula="y = y(real choices) + sum over copy choices of w_tk x_t",
    source="arXiv 2410.07348 (MoE++), section 3.1; arXiv 2509.01322 (LongCat-Flash)",
    cases=lambda subject: routed(subject),
    broken=lambda: bank_under_test(
        _CopiesInFull(BankSpec(4, 6, 5, special=("zero", "copy", "copy")))
    ),
    unless=lambda subject: (
        None
        if subject.spec is not None and subject.spec.special
        else "it names no special experts (spec.special)"
    ),
)
def special_experts(subject: BankUnderTest, case: Case) -> None:
    assert subject.spec is not None
    x_TH, routing, g_TH = routed_call(subject, case)
    real, ids_TK = subject.real_experts, routing.experts_TK
    copies = [real + n for n, kind in enumerate(subject.spec.special) if kind == "copy"]
    copy_TK = torch.isin(ids_TK, torch.tensor(copies, dtype=torch.int64))
    if routing.kept_TK is not None:
        copy_TK = copy_TK & routing.kept_TK
    ordinary = replace(
        routing,
        experts_TK=ids_TK.masked_fill(ids_TK >= real, -1),
        weights_TK=routing.weights_TK.masked_fill(ids_TK >= real, 0),
    )
    share_T1 = routing.weights_TK.masked_fill(~copy_TK, 0).sum(-1, keepdim=True)
    found = results(subject, x_TH, routing, g_TH)
    want = results(subject, x_TH, ordinary, g_TH)
    want["y_TH"] = want["y_TH"] + share_T1 * x_TH
    want["d x_TH"] = want["d x_TH"] + share_T1 * g_TH
    said_TK = (g_TH * x_TH).sum(-1, keepdim=True) * copy_TK
    want["d weights_TK"] = torch.where(ids_TK >= real, said_TK, want["d weights_TK"])
    sizes = (x_TH.norm() + g_TH.norm()) * (1 + routing.weights_TK.norm()) * (1 + x_TH.norm())
    for name, tensor in want.items():
        agree(
            subject,
            found[name],
            tensor,
            f"special experts apart: {name}",
            num_rows=rows_of(case),
            size=tensor.norm() + sizes * (name in ("y_TH", "d x_TH", "d weights_TK")),
        )


LAWS = (identical_experts, down_scales_output, relabelled_experts, special_experts)
