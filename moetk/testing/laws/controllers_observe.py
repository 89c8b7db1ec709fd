"""Laws of what a controller observes: which choices count, and that micro-batches add up.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.controllers import BiasUpdate
from moetk.kernels.counting import count_choices
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.controllers_subject import ControllerSubject
from moetk.testing.strategies.losses import changed, relabel, routings, take_rows

# No two sums of scores are equal by chance, so that no rounding turns a sign.
PATTERNS = ("gaussian", "spaced", "sorted", "one-hot", "starved")


def cases(
    subject: ControllerSubject, *masks: str, unused: bool = False, lengths: tuple[int, ...] = ()
) -> SearchStrategy[Case]:
    return routings(
        subject.num_experts,
        subject.top_k,
        patterns=PATTERNS,
        masks=masks or ("absent", "scattered"),
        unused=unused,
        lengths=lengths or (1, 2, 3, 5, 8, 0),
    )


def pick(case: Case) -> int:
    return int(case.settings["pick"] or 0)


def micro_batches(case: Case) -> list[Case]:
    """The sequences of a case, one by one."""
    batch, length = int(case.settings["batch"] or 0), int(case.settings["length"] or 0)
    rows = torch.arange(batch * length).reshape(batch, length)
    return [take_rows(case, rows[number], 1) for number in range(batch)]


class _Shares(BiasUpdate):
    """Observes which part of the choices each expert got."""

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        counts_E = super().observe(routing, ctx)
        return counts_E / counts_E.sum().clamp(min=1)


@law(
    "C1",
    "micro-batches add up",
    formula='observe(r1 and r2) = observe(r1) + observe(r2), or one after the other where "cat"',
    source="arXiv 2408.15664, algorithm 1, over the batch of one optimizer step",
    cases=lambda subject: cases(subject, unused=True),
    broken=lambda: ControllerSubject(_Shares(1e-3)),
)
def additive(subject: ControllerSubject, case: Case) -> None:
    parts = micro_batches(case)
    if not parts:
        return
    whole, summed = subject.run().total(case), subject.run().total(*parts)
    names = [str(number) for number in range(len(whole))]
    hold(len(whole) == len(summed), f"{len(summed)} tensors for the parts, {len(whole)} for all")
    got, want = (dict(zip(names, column, strict=True)) for column in (summed, whole))
    subject.hold_same(got, want, f"{len(parts)} micro-batches against one")


class _Decayed(BiasUpdate):
    """An average that forgets, token by token."""

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        weight_T = 0.9 ** torch.arange(len(routing.experts_TK)).flip(0)
        used_TK = (routing.experts_TK >= 0) * weight_T[:, None]
        counts_E = torch.zeros(routing.num_experts)
        ids_N = routing.experts_TK.clamp(min=0).flatten()
        return counts_E.scatter_add(0, ids_N, used_TK.flatten())


@law(
    "C2",
    "tokens have no order",
    formula="step(observe(Q r)) = step(observe(r)), Q a permutation of the tokens",
    source="arXiv 2408.15664, algorithm 1: counts",
    cases=lambda subject: cases(subject, unused=True),
    broken=lambda: ControllerSubject(_Decayed(1e-3)),
)
def token_order(subject: ControllerSubject, case: Case) -> None:
    g = torch.Generator().manual_seed(pick(case))
    rows = torch.randperm(len(case["logits_TE"]), generator=g)
    got = subject.run().step(take_rows(case, rows, 1)).state()
    want = subject.run().step(take_rows(case, torch.arange(len(rows)), 1)).state()
    subject.hold_same(got, want, "after the same tokens in another order")


class _Unmasked(BiasUpdate):
    """Counts whatever the router returned."""

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        return super().observe(routing, RouterContext())


@law(
    "C3",
    "padding is not observed",
    formula="step(observe(r, token_mask = m)) = step(observe(rows m of r))",
    source="torchtitan models/common/moe.py counts padding: the bias then serves it",
    cases=lambda subject: cases(subject, "scattered", "padding", unused=True),
    broken=lambda: ControllerSubject(_Unmasked(1e-3)),
)
def masking(subject: ControllerSubject, case: Case) -> None:
    rest = changed(take_rows(case, case["token_mask"], 1), "token_mask")
    got, want = subject.run().step(case).state(), subject.run().step(rest).state()
    subject.hold_same(got, want, "with padding masked, against padding removed")


def no_bias(subject: ControllerSubject) -> str | None:
    if subject.has_bias:
        return None
    return "it is not bound to a router with an e_score_correction_bias, (E,)"


def _no_relabelling(subject: ControllerSubject) -> str | None:
    if getattr(subject.controller, "experts_differ", False):
        return "it declares experts_differ"
    return no_bias(subject)


def _relabelled(subject: ControllerSubject, case: Case) -> None:
    g = torch.Generator().manual_seed(pick(case))
    order_E = torch.randperm(subject.num_experts, generator=g)
    got_E = subject.run().step(relabel(case, order_E)).bias_E
    want_E = subject.run().step(case).bias_E[order_E]
    what = f"the bias with the experts in the order {order_E.tolist()}"
    hold(subject.near(got_E, want_E), f"{what} is another", got=got_E, want=want_E)


class _OneLess(BiasUpdate):
    """The last class of its histogram is meant for skipped tokens."""

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        counts_E = super().observe(routing, ctx)
        return counts_E * (torch.arange(len(counts_E)) < len(counts_E) - 1)


relabelling: Law[ControllerSubject] = law(
    "C4",
    "experts have no names",
    formula="a routing with its experts permuted moves the same bias, permuted",
    source="transformers' one_hot with E + 1 classes for `skip`: an expert gets lost at the end",
    cases=lambda subject: cases(subject, "absent"),
    broken=lambda: ControllerSubject(_OneLess(1e-3)),
    unless=_no_relabelling,
)(_relabelled)


class _UnusedIsExpert0(BiasUpdate):
    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        return count_choices(routing.experts_TK.clamp(min=0), routing.num_experts)[0]


unused_slots: Law[ControllerSubject] = law(
    "C5",
    "an unused slot is no expert's",
    formula="with some slots at -1, permuted experts move the same bias, permuted",
    source="transformers, ZAYA's skipped tokens: expert 0 with weight 0, which a count still sees",
    cases=lambda subject: cases(subject, "absent", unused=True),
    broken=lambda: ControllerSubject(_UnusedIsExpert0(1e-3)),
    unless=_no_relabelling,
)(_relabelled)


class _KeptAlone(BiasUpdate):
    """Counts after capacity: a full expert never looks overloaded."""

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        kept_TK = routing.kept_TK
        ids = routing.experts_TK
        if kept_TK is not None:
            ids = ids.masked_fill(~kept_TK, -1)
        return count_choices(ids, routing.num_experts)[0]


@law(
    "C6",
    "what was dropped was wanted",
    formula="observe(r with choices dropped for capacity) = observe(r)",
    source="arXiv 2408.15664, section 3: the load that a bias corrects is what tokens chose",
    cases=lambda subject: cases(subject, "absent"),
    broken=lambda: ControllerSubject(_KeptAlone(1e-3)),
    unless=lambda subject: None if subject.counts_choices else "it observes no counts of choices",
)
def dropped(subject: ControllerSubject, case: Case) -> None:
    g = torch.Generator().manual_seed(pick(case))
    kept_TK = torch.rand(case["experts_TK"].shape, generator=g) < 0.5
    after = changed(case, kept_TK=kept_TK, weights_TK=case["weights_TK"] * kept_TK)
    [got], [want] = subject.run().total(after), subject.run().total(case)
    hold(torch.equal(got, want), f"{got.tolist()} after a capacity, {want.tolist()} before")


class _CountsItself(BiasUpdate):
    """Adds up in `observe`, which a recomputed or undifferentiated forward calls too."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.seen = torch.tensor(0)

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        self.seen = self.seen + super().observe(routing, ctx)
        return super().observe(routing, ctx)

    def step(self, observed: Tensor) -> None:
        super().step(self.seen)
        self.seen = torch.tensor(0)


@law(
    "C7",
    "to observe is not to count",
    formula="an observation that is not committed changes nothing, now or at the next step",
    source="activation checkpointing runs a forward twice; torchtitan halves what it counted",
    cases=cases,
    broken=lambda: ControllerSubject(_CountsItself(1e-3)),
)
def observes_only(subject: ControllerSubject, case: Case) -> None:
    quiet, run = subject.run(), subject.run()
    before = run.state()
    for times in (1, 2, 3):
        run.observe(relabel(case, torch.arange(subject.num_experts).roll(times)))
    subject.hold_same(run.state(), before, "after observing, before a step", exact=True)
    got, want = run.step(case).state(), quiet.step(case).state()
    subject.hold_same(got, want, "a step after observations that were not committed", exact=True)


LAWS: tuple[Law[ControllerSubject], ...] = (
    additive,
    token_order,
    masking,
    relabelling,
    unused_slots,
    dropped,
    observes_only,
)
