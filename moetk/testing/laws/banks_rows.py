"""What every batch asks of a bank: a row is its own affair, and the call leaves nothing behind.

Notation: y = y(x, routing); x_TH rows, g_TH cotangent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor
from torch.nn import functional as F

from moetk.context import RouterContext
from moetk.dispatch import Capacity
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.laws.banks_law import law
from moetk.testing.laws.banks_routing import RightBank
from moetk.testing.laws.banks_subject import (
    BankUnderTest,
    agree,
    agree_all,
    bank_under_test,
    results,
    routed,
    routed_call,
    rows_of,
    run,
)
from moetk.testing.strategies.routings import (
    CROWDS,
    LAYOUTS,
    TOKENS,
    generator,
    laid_out,
    routing_of,
    seed_of,
    taken,
)

_OF_ROWS = ("y_TH", "d x_TH", "d weights_TK")


def _crowds(subject: BankUnderTest) -> SearchStrategy[Case]:
    return routed(subject, tokens=(*TOKENS, *CROWDS))


# B11


class _HasRoomForFew(RightBank):
    """Gives each expert room for its fair share, in the order of the tokens, and says nothing."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return super().forward(x_TH, Capacity(1.0)(routing, RouterContext()))


@law(
    "B11",
    "the order of the tokens is irrelevant",
    formula="y(x[p], routing[p]) = y(x, routing)[p], and so every gradient",
    source="arXiv 1701.06538, equation 1, speaks of one token",
    cases=_crowds,
    broken=lambda: bank_under_test(_HasRoomForFew()),
)
def token_order(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    order_T = torch.randperm(len(x_TH), generator=generator(seed_of(case)))
    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, x_TH[order_T], taken(routing, order_T), g_TH[order_T])
    want |= {name: want[name][order_T] for name in _OF_ROWS}
    agree_all(subject, found, want, num_rows=rows_of(case), because="tokens in another order")


# B12


class _AveragesByLoad(RightBank):
    """Divides an expert's output by how many rows it has got."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        ids_TK = routing.experts_TK.clamp(min=0)
        load_E = torch.bincount(ids_TK.flatten(), minlength=routing.num_experts).clamp(min=1)
        return super().forward(
            x_TH, replace(routing, weights_TK=routing.weights_TK / load_E[ids_TK])
        )


@law(
    "B12",
    "a batch is its parts",
    formula="y(x || x') = y(x) || y(x'); parameter gradients add up",
    source="arXiv 2211.15841: without drops no token sees another",
    cases=_crowds,
    broken=lambda: bank_under_test(_AveragesByLoad()),
)
def batch_is_its_parts(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    whole = results(subject, x_TH, routing, g_TH)
    cut = seed_of(case) % (len(x_TH) + 1)
    parts = [
        results(subject, x_TH[rows_R], taken(routing, rows_R), g_TH[rows_R])
        for rows_R in torch.arange(len(x_TH)).split([cut, len(x_TH) - cut])
    ]
    for name, tensor in whole.items():
        of_parts = [part[name] for part in parts]
        agree(
            subject,
            tensor,
            torch.cat(of_parts) if name in _OF_ROWS else of_parts[0] + of_parts[1],
            f"the batch in one against {cut} tokens and the rest: {name}",
            num_rows=rows_of(case),
            size=sum(float(t.norm()) for t in of_parts),
        )


# B13


class _DispatchesByProduct(RightBank):
    """Moves rows by multiplying with a 0/1 matrix, in which 0 times NaN is NaN."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return super().forward(torch.eye(len(x_TH), dtype=x_TH.dtype) @ x_TH, routing)


@law(
    "B13",
    "a row of NaN stays in its row",
    formula="x_s := NaN, +inf or -inf leaves y_t and dx_t, dw_t of t != s as they were (g_s = 0)",
    source="arXiv 2006.16668 dispatches by einsum over tokens, where 0 times NaN leaks",
    cases=lambda subject: routed(subject, tokens=(2, 5, 9)),
    broken=lambda: bank_under_test(_DispatchesByProduct()),
)
def nan_stays(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    spoilt = seed_of(case) % len(x_TH)
    others_T = torch.arange(len(x_TH)) != spoilt
    g_TH[spoilt] = 0
    bad_TH = x_TH.clone()
    bad_TH[spoilt] = (float("nan"), float("inf"), -float("inf"))[seed_of(case) % 3]
    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, bad_TH, routing, g_TH)
    agree_all(
        subject,
        {name: found[name][others_T] for name in _OF_ROWS},
        {name: want[name][others_T] for name in _OF_ROWS},
        num_rows=rows_of(case),
        because=f"row {spoilt} is {float(bad_TH[spoilt, 0])}, other rows",
    )


# B14


class _IgnoresStrides(RightBank):
    """Reads the rows as a kernel does that was given a pointer and the shape."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        row_major = (x_TH.shape[1], 1)
        dense = x_TH.untyped_storage().nbytes() >= x_TH.numel() * x_TH.itemsize
        return super().forward(x_TH.as_strided(x_TH.shape, row_major) if dense else x_TH, routing)


@st.composite
def _any_layout(draw: DrawFn, subject: BankUnderTest) -> Case:
    layout = draw(st.sampled_from(LAYOUTS))
    case = draw(routed(subject))
    return Case(case.tensors, {**case.settings, "layout": layout})


@law(
    "B14",
    "rows and cotangents in any layout",
    formula="y and every gradient at strided x, weights and g = at contiguous copies of them",
    source="y.sum().backward() sends an expanded cotangent, a split of QKV sliced rows",
    cases=_any_layout,
    broken=lambda: bank_under_test(_IgnoresStrides()),
)
def any_layout(subject: BankUnderTest, case: Case) -> None:
    layout = str(case.settings["layout"])
    x_TH, routing, g_TH = routed_call(subject, case)
    x_TH, g_TH = laid_out(x_TH, layout), laid_out(g_TH, layout)
    strided = replace(
        routing,
        experts_TK=laid_out(routing.experts_TK.double(), "transposed").long(),
        weights_TK=laid_out(routing.weights_TK, "transposed"),
    )
    found = results(subject, x_TH, strided, g_TH)
    want = results(subject, x_TH.contiguous(), routing, g_TH.contiguous())
    agree_all(subject, found, want, num_rows=rows_of(case), because=f"{layout} rows and cotangent")


# B15


class _ScalesInPlace(RightBank):
    """Multiplies the rows where they lie, and the caller's tensor with them."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        with torch.no_grad():
            x_TH *= 1.01
        return super().forward(x_TH, routing)


@law(
    "B15",
    "nothing that is passed in is changed",
    formula="x, ids, weights, kept and parameters are bitwise the same after forward and backward",
    source="transformers' mixtral and phimoe blocks multiply hidden_states by noise in place",
    cases=routed,
    broken=lambda: bank_under_test(_ScalesInPlace()),
)
def inputs_unchanged(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = case["x_TH"], routing_of(case, subject.num_experts), case["g_TH"]
    passed = {**case.tensors, **subject.parameters}
    before = {name: tensor.detach().clone() for name, tensor in passed.items()}
    with torch.no_grad():
        subject(x_TH, routing)
    run(subject, x_TH, routing, g_TH)
    for name, tensor in before.items():
        hold(torch.equal(passed[name], tensor), f"the call changed {name}", before=tensor)


# B16


class _DropsOutInEval(RightBank):
    """torch.nn.functional.dropout drops unless it is told not to: its default is training=True."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return super().forward(F.dropout(x_TH, 0.1), routing)


@law(
    "B16",
    "the same call is the same, to the bit",
    formula="two runs: y and every gradient bitwise equal",
    source="activation checkpointing takes a second run for the first",
    cases=routed,
    broken=lambda: bank_under_test(_DropsOutInEval()),
)
def deterministic(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    first, again = (results(subject, x_TH, routing, g_TH) for _ in range(2))
    for name, tensor in first.items():
        hold(
            torch.equal(tensor, again[name]),
            f"{name} differs between two runs",
            first=tensor,
            again=again[name],
        )


# B17


class _RemembersTheLastCall(RightBank):
    """Keeps the routing weights on itself, and its backward reads them there."""

    last_T1: Tensor

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        self.last_T1 = routing.weights_TK.detach().sum(-1, keepdim=True)
        y_TH = super().forward(x_TH, routing)
        # The gradient is scaled by this call's weights over those of the last call.
        here_T1 = self.last_T1
        if y_TH.requires_grad:
            y_TH.register_hook(lambda g_TH: g_TH * (self.last_T1 == here_T1))
        return y_TH


@law(
    "B17",
    "two calls in flight",
    formula="y, y' forward, then y', y backward = each alone",
    source="pipelines and activation checkpointing interleave calls",
    cases=lambda subject: routed(subject, tokens=(2, 5, 9)),
    broken=lambda: bank_under_test(_RemembersTheLastCall()),
)
def two_in_flight(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    back_T = torch.arange(len(x_TH)).flip(0)
    calls = [
        (x_TH, routing, g_TH),
        (2 * x_TH[back_T], taken(routing, back_T), g_TH[back_T]),
    ]
    alone = [results(subject, *call) for call in calls]
    leaves = [
        (x_TH.detach().requires_grad_(), r.weights_TK.detach().clone().requires_grad_())
        for x_TH, r, _ in calls
    ]
    outputs = [
        subject(x_TH, replace(r, weights_TK=weights_TK))
        for (x_TH, weights_TK), (_, r, _) in zip(leaves, calls, strict=True)
    ]
    for which in (1, 0):
        g_TH = calls[which][2]
        found = tuple(torch.zeros_like(leaf) for leaf in leaves[which])
        if outputs[which].requires_grad:  # where no choice is used, it may not: B1 and B20 ask
            found = torch.autograd.grad(outputs[which], leaves[which], g_TH, materialize_grads=True)
        want = (alone[which]["d x_TH"], alone[which]["d weights_TK"])
        for name, value, truth in zip(("x_TH", "weights_TK"), found, want, strict=True):
            agree(
                subject,
                value,
                truth,
                f"d {name} of call {which + 1} of 2, backward in reverse",
                num_rows=rows_of(case),
            )


# B31


class _SeedsTheWorld(RightBank):
    """Seeds torch in every call: whatever draws after it draws the same in each step."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        torch.manual_seed(1234)
        return super().forward(x_TH, routing)


@law(
    "B31",
    "the global random state is left alone",
    formula="torch.get_rng_state() is the same after forward and backward",
    source="dropout and noisy routers of other layers draw from it",
    cases=routed,
    broken=lambda: bank_under_test(_SeedsTheWorld()),
)
def random_state_unchanged(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = case["x_TH"], routing_of(case, subject.num_experts), case["g_TH"]
    torch.default_generator.manual_seed(seed_of(case))  # not the state that a seed of 0 leaves
    before = torch.get_rng_state()
    run(subject, x_TH, routing, g_TH)
    hold(
        torch.equal(before, torch.get_rng_state()),
        "torch.get_rng_state() differs after the call: the bank seeds torch, or draws what it "
        "does not use",
    )


LAWS = (
    token_order,
    batch_is_its_parts,
    nan_stays,
    any_layout,
    inputs_unchanged,
    deterministic,
    two_in_flight,
    random_state_unchanged,
)
