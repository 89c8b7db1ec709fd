"""What a routing asks of a bank: each used and kept choice counts once, with its weight.

Notation: y_t = sum_k w_tk f_e(x_t) with e = e_tk; x_TH rows, g_TH cotangent, f_e one expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from moetk.experts import BankSpec, ExpertBank
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.laws.banks_law import law
from moetk.testing.laws.banks_subject import (
    BankUnderTest,
    agree,
    agree_all,
    bank_under_test,
    needs_output_scale,
    results,
    routed,
    routed_call,
    rows_of,
    run,
)
from moetk.testing.strategies.routings import (
    DISTINCT,
    MANY,
    REPEATED,
    generator,
    normal,
    seed_of,
)


class RightBank(ExpertBank):
    """A right bank of four experts, with biases. Broken parts change one thing about it."""

    def __init__(self, spec: BankSpec | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(6, 4, 5, bias=True, spec=spec)


# B1


class _Stacks(RightBank):
    """Collects the rows of its tokens in a list, which no token leaves empty."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return torch.stack(list(super().forward(x_TH, routing)))


@law(
    "B1",
    "a batch without tokens",
    formula="T = 0: y is (0, H), every gradient is there and is 0",
    source="a rank of expert parallelism without tokens still takes part in backward",
    cases=lambda subject: routed(subject, tokens=(0,), patterns=("random", "dropped")),
    broken=lambda: bank_under_test(_Stacks()),
)
def no_tokens(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    found = run(subject, x_TH, routing, g_TH)
    hold(found.y_TH.shape == x_TH.shape, f"y_TH is {tuple(found.y_TH.shape)}, not (0, H)")
    for name, gradient in zip(found.leaves, found.gradients, strict=True):
        hold(gradient is not None, f"{name} has no gradient: the graph ends before it")
        assert gradient is not None
        hold(gradient == 0, f"the gradient of {name} is not 0", gradient=gradient)


# B2


class _CountsFromTheEnd(RightBank):
    """-1 reads the last expert, as an index in Python does; its weight is 0."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        ids_TK = routing.experts_TK
        last = routing.num_experts - 1
        return super().forward(
            x_TH, replace(routing, experts_TK=ids_TK.masked_fill(ids_TK < 0, last))
        )


@law(
    "B2",
    "an unused slot is not there",
    formula="y with slots of id -1 put in anywhere = y; d/dw of such a slot = 0",
    source="moetk.TokenChoice: -1 = unused slot, as top-p routing leaves them (arXiv 2403.07652)",
    cases=lambda subject: routed(subject),
    broken=lambda: bank_under_test(_CountsFromTheEnd()),
)
def unused_slots(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    num_tokens, top_k = routing.experts_TK.shape
    width = top_k + 2
    place_TW = torch.rand(num_tokens, width, generator=generator(seed_of(case))).argsort(-1)
    place_TK = place_TW[:, :top_k].sort(-1).values

    def spread(values_TK: Tensor, empty: float | bool) -> Tensor:
        return values_TK.new_full((num_tokens, width), empty).scatter(1, place_TK, values_TK)

    kept_TK = routing.kept_TK
    wide = replace(
        routing,
        experts_TK=spread(routing.experts_TK, -1),
        weights_TK=spread(routing.weights_TK, 0),
        kept_TK=None if kept_TK is None else spread(kept_TK, True),
    )
    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, x_TH, wide, g_TH)
    dw_TW = found["d weights_TK"]
    hold(dw_TW[wide.experts_TK < 0] == 0, "an unused slot's weight has a gradient", gradient=dw_TW)
    found["d weights_TK"] = dw_TW.gather(1, place_TK)
    agree_all(subject, found, want, num_rows=rows_of(case), because="with unused slots put in")


# B3


class _ComputesDrops(RightBank):
    """Does not read kept_TK: a dropped choice is computed and multiplied by 0."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        return super().forward(x_TH, replace(routing, kept_TK=None))


@law(
    "B3",
    "a dropped choice is not there",
    formula="y with kept_TK = y with the dropped ids at -1; d/dw of a dropped choice = 0",
    source="arXiv 2006.16668, section 2.2: a token beyond capacity passes by its expert",
    cases=lambda subject: routed(subject, patterns=("dropped", "mixed")),
    broken=lambda: bank_under_test(_ComputesDrops()),
)
def dropped_choices(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    assert routing.kept_TK is not None
    absent = routing.experts_TK.masked_fill(~routing.kept_TK, -1)
    without = replace(routing, experts_TK=absent, kept_TK=None)
    found = results(subject, x_TH, routing, g_TH)
    want = results(subject, x_TH, without, g_TH)
    dw_TK = found["d weights_TK"]
    hold(
        dw_TK[~routing.kept_TK] == 0,
        "a dropped choice's weight has a gradient: the bank computes what kept_TK drops",
        gradient=dw_TK,
    )
    agree_all(subject, found, want, num_rows=rows_of(case), because="drops against unused slots")


# B4


class _LastDuplicateWins(RightBank):
    """Writes weights into a (T, E) table, where a second one of an expert replaces the first."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        ids_TK, weights_TK = routing.experts_TK, routing.weights_TK
        later_TKK = (ids_TK[:, :, None] == ids_TK[:, None, :]).triu(1)
        replaced_TK = later_TKK.any(-1)
        return super().forward(
            x_TH, replace(routing, weights_TK=weights_TK.masked_fill(replaced_TK, 0))
        )


@law(
    "B4",
    "both of two duplicates count",
    formula="experts [a, a] with weights [u, v] = expert [a] with weight [u + v]",
    source="arXiv 2606.19348: rows of a hash table name one expert twice",
    cases=lambda subject: routed(subject, patterns=(*DISTINCT, "unused")),
    broken=lambda: bank_under_test(_LastDuplicateWins()),
    unless=needs_output_scale,
)
def duplicates(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    ids_TK, weights_TK = routing.experts_TK, routing.weights_TK
    twice = replace(
        routing,
        experts_TK=torch.cat([ids_TK, ids_TK], 1),
        weights_TK=torch.cat([0.25 * weights_TK, 0.75 * weights_TK], 1),
    )
    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, x_TH, twice, g_TH)
    for half, dw_TK in enumerate(found.pop("d weights_TK").chunk(2, dim=1)):
        agree(
            subject,
            dw_TK,
            want["d weights_TK"],
            f"d weights_TK of duplicate {half}",
            num_rows=rows_of(case),
        )
    want.pop("d weights_TK")
    agree_all(subject, found, want, num_rows=rows_of(case), because="each expert named twice")


# B5


class _Overwrites(RightBank):
    """y[tokens] = out where += is meant: of a token's experts, only the last one's output stays."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        ids_TK = routing.experts_TK
        stays_TK = ids_TK == ids_TK.amax(-1, keepdim=True)
        return super().forward(x_TH, replace(routing, weights_TK=routing.weights_TK * stays_TK))


@law(
    "B5",
    "a token's output is the sum over its slots",
    formula="y(e, w) = sum_k y(e[:, k], w[:, k])",
    source="arXiv 1701.06538, equation 1",
    cases=lambda subject: routed(subject, more_choices=MANY),
    broken=lambda: bank_under_test(_Overwrites()),
)
def sum_over_slots(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    kept_TK = routing.kept_TK
    whole = results(subject, x_TH, routing, g_TH)
    parts = []
    for k in range(routing.experts_TK.shape[1]):
        one = replace(
            routing,
            experts_TK=routing.experts_TK[:, k : k + 1],
            weights_TK=routing.weights_TK[:, k : k + 1],
            kept_TK=None if kept_TK is None else kept_TK[:, k : k + 1],
        )
        parts.append(results(subject, x_TH, one, g_TH))
    for name, tensor in whole.items():
        of_slots = [part[name] for part in parts]
        apart = name == "d weights_TK"
        agree(
            subject,
            tensor,
            torch.cat(of_slots, 1) if apart else torch.stack(of_slots).sum(0),
            f"all slots at once against slot by slot: {name}",
            num_rows=rows_of(case),
            size=sum(float(t.norm()) for t in of_slots),
        )


# B6


class _Renormalises(RightBank):
    """Divides the weights by their sum once more; most routers have done so, not all."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        weights_TK = routing.weights_TK
        total_T1 = weights_TK.abs().sum(-1, keepdim=True) + 1e-20
        return super().forward(x_TH, replace(routing, weights_TK=weights_TK / total_T1))


def _two_weights(subject: BankUnderTest) -> SearchStrategy[Case]:
    return routed(subject, patterns=(*DISTINCT, *REPEATED, "unused"))


@law(
    "B6",
    "linear in the weights",
    formula="y(a u + b v) = a y(u) + b y(v) at the same experts",
    source="arXiv 1701.06538, equation 1",
    cases=_two_weights,
    broken=lambda: bank_under_test(_Renormalises()),
    unless=needs_output_scale,
)
def linear_in_weights(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, _ = routed_call(subject, case)
    a, b = 2.5, -0.75
    u_TK = routing.weights_TK
    v_TK = normal(tuple(u_TK.shape), generator(seed_of(case)), u_TK.dtype)
    v_TK = v_TK.masked_fill(routing.experts_TK < 0, 0)
    mixed, of_u, of_v = (
        subject(x_TH, replace(routing, weights_TK=w)).detach()
        for w in (a * u_TK + b * v_TK, u_TK, v_TK)
    )
    agree(
        subject,
        mixed,
        a * of_u + b * of_v,
        "y of a sum of weights, against the sum of the y",
        num_rows=rows_of(case),
        size=abs(a) * of_u.norm() + abs(b) * of_v.norm(),
    )


# B7


class _SortsIdsAlone(RightBank):
    """Sorts each token's ids, for better locality, and leaves the weights where they were."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        return super().forward(
            x_TH, replace(routing, experts_TK=routing.experts_TK.sort(-1).values)
        )


@law(
    "B7",
    "the order of a token's slots is irrelevant",
    formula="y(e[:, p], w[:, p]) = y(e, w) for a permutation p of each row",
    source="rounding apart a sum has no order; torch.topk(sorted=False) leaves any",
    cases=lambda subject: routed(subject, more_choices=MANY),
    broken=lambda: bank_under_test(_SortsIdsAlone()),
)
def slot_order(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    order_TK = torch.rand(routing.experts_TK.shape, generator=generator(seed_of(case))).argsort(-1)
    kept_TK = routing.kept_TK
    moved = replace(
        routing,
        experts_TK=routing.experts_TK.gather(1, order_TK),
        weights_TK=routing.weights_TK.gather(1, order_TK),
        kept_TK=None if kept_TK is None else kept_TK.gather(1, order_TK),
    )
    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, x_TH, moved, g_TH)
    want["d weights_TK"] = want["d weights_TK"].gather(1, order_TK)
    agree_all(subject, found, want, num_rows=rows_of(case), because="slots in another order")


# B8


class _AnswersInTheWeightsDtype(RightBank):
    """Sums in the dtype of the routing weights, and forgets to return to that of the rows."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        return super().forward(x_TH, routing).to(routing.weights_TK.dtype)


@st.composite
def _any_weight_dtype(draw: DrawFn, subject: BankUnderTest) -> Case:
    case = draw(routed(subject))
    name = draw(st.sampled_from(("float32", "bfloat16", "float16", "float64")))
    return Case(case.tensors, {**case.settings, "weight_dtype": name})


@law(
    "B8",
    "routing weights of any floating dtype",
    formula="y(w) = y(w raised to the rows' dtype), in the rows' dtype; d/dw in that of w",
    source="moetk.TokenChoice: weights_TK as the family computes it, the bank promotes",
    cases=_any_weight_dtype,
    broken=lambda: bank_under_test(_AnswersInTheWeightsDtype()),
)
def weight_dtypes(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    dtype = getattr(torch, str(case.settings["weight_dtype"]))
    low = replace(routing, weights_TK=routing.weights_TK.to(dtype))
    raised = replace(routing, weights_TK=low.weights_TK.to(subject.dtype))
    found = run(subject, x_TH, low, g_TH)
    hold(found.y_TH.dtype == x_TH.dtype, f"y_TH is {found.y_TH.dtype}, x_TH {x_TH.dtype}")
    got = found.results()
    hold(got["d weights_TK"].dtype == dtype, f"d weights_TK is {got['d weights_TK'].dtype}")
    if torch.promote_types(dtype, subject.dtype) != subject.dtype:
        return  # weights wider than the bank: what they are rounded to is the bank's own
    want = results(subject, x_TH, raised, g_TH)
    want["d weights_TK"] = want["d weights_TK"].to(dtype)
    one_rounding = torch.finfo(dtype).eps * got["d weights_TK"].double().norm()
    error = (got.pop("d weights_TK").double() - want.pop("d weights_TK").double()).norm()
    hold(error <= one_rounding, f"d weights_TK differs by {float(error):.3g} in {dtype}")
    agree_all(subject, got, want, num_rows=rows_of(case), because=f"weights in {dtype}")


LAWS = (
    no_tokens,
    unused_slots,
    dropped_choices,
    duplicates,
    sum_over_slots,
    linear_in_weights,
    slot_order,
    weight_dtypes,
)
