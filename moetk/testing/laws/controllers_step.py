"""Laws of a controller's step: where a bias moves, how far, and in which precision.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.controllers import BiasUpdate
from moetk.controllers.bias_update import BUFFER
from moetk.equivalence.judge import floor
from moetk.kernels.counting import count_choices
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.controllers_observe import cases, no_bias
from moetk.testing.laws.controllers_subject import ControllerSubject
from moetk.testing.strategies.losses import routings


class Rule:
    """A bias rule as it is often written: it adds to the router's buffer."""

    accumulate = "sum"
    rate = 2.0**-10

    def bind(self, router: Any) -> None:
        self.router = router

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        return count_choices(routing.experts_TK, routing.num_experts, ctx.token_mask)[0]

    def update(self, counts_E: Tensor) -> Tensor:
        return self.rate * (counts_E.double().mean() - counts_E).sign()

    @torch.no_grad()
    def step(self, observed: Tensor) -> None:
        bias_E: Tensor = getattr(self.router, BUFFER)
        bias_E.add_(self.update(observed).to(bias_E))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _ZeroIsOver(Rule):
    """Two cases where there are three: who has the mean is taken for overloaded."""

    def update(self, counts_E: Tensor) -> Tensor:
        under_E = counts_E < counts_E.double().mean()
        return torch.where(under_E, self.rate, -self.rate)


def _no_counts(subject: ControllerSubject) -> str | None:
    if not subject.counts_choices:
        return "it observes no counts of choices"
    return no_bias(subject)


@law(
    "C8",
    "balance is rest",
    formula="all counts equal: the bias stays, to the bit",
    source="arXiv 2408.15664, algorithm 1: sign(0) = 0",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=("rotated",),
        batches=(1, 2, 3),
        lengths=(subject.num_experts,),
    ),
    broken=lambda: ControllerSubject(_ZeroIsOver()),
    unless=_no_counts,
)
def rest(subject: ControllerSubject, case: Case) -> None:
    run = subject.run(start=2.0**-5)
    before, after = run.bias_E, run.step(case).bias_E
    hold(torch.equal(before, after), "equal counts, and it moves", move=after - before)


class _Divides(Rule):
    """Shares of what was observed, whatever that was."""

    def update(self, counts_E: Tensor) -> Tensor:
        shares_E = counts_E / counts_E.sum()
        return self.rate * (1 / len(shares_E) - shares_E)


@law(
    "C9",
    "nothing observed, nothing moved",
    formula="T = 0, or every token masked: the bias stays, to the bit",
    source="a step of padding alone: a share of no tokens is NaN, and stays in the bias for good",
    cases=lambda subject: routings(subject.num_experts, subject.top_k, masks=("none",)),
    broken=lambda: ControllerSubject(_Divides()),
    unless=_no_counts,
)
def nothing(subject: ControllerSubject, case: Case) -> None:
    run = subject.run(start=2.0**-5)
    before, after = run.bias_E, run.step(case).bias_E
    hold(torch.equal(before, after), "no token, and it moves", move=after - before)


class _Flipped(Rule):
    def update(self, counts_E: Tensor) -> Tensor:
        return -super().update(counts_E)


@law(
    "C10",
    "towards balance",
    formula="c_e > mean: b_e does not rise; c_e < mean: b_e does not fall",
    source="arXiv 2408.15664, algorithm 1, line 6: b_e + u sign(mean c - c_e)",
    cases=lambda subject: cases(subject, unused=True),
    broken=lambda: ControllerSubject(_Flipped()),
    unless=_no_counts,
)
def towards_balance(subject: ControllerSubject, case: Case) -> None:
    run = subject.run()
    [counts_E] = run.total(case)
    move_E = run.step(case).bias_E
    over_E = counts_E * len(counts_E) > counts_E.sum()
    under_E = counts_E * len(counts_E) < counts_E.sum()
    hold(not (move_E[over_E] > 0).any(), "an overloaded expert rises", counts=counts_E, move=move_E)
    hold(not (move_E[under_E] < 0).any(), "a starved expert falls", counts=counts_E, move=move_E)


class _Proportional(Rule):
    """The rate times how many tokens are missing."""

    def update(self, counts_E: Tensor) -> Tensor:
        return self.rate * (counts_E.double().mean() - counts_E)


def _no_rate(subject: ControllerSubject) -> str | None:
    if subject.rate is None:
        return "it has no `rate`, a number or a function of the step"
    return no_bias(subject)


@law(
    "C11",
    "a step is short",
    formula="|b' - b| <= rate, and <= 2 rate (1 - 1/E) where centred",
    source="arXiv 2408.15664, section 3: the sign, not the size, of the error",
    cases=cases,
    broken=lambda: ControllerSubject(_Proportional()),
    unless=_no_rate,
)
def short(subject: ControllerSubject, case: Case) -> None:
    most = subject.rate or 0.0
    if subject.centred:
        most *= 2 * (1 - 1 / subject.num_experts)
    move_E = subject.run().step(case).bias_E
    rounded = most * (1 + 2 * floor(torch.float32, subject.num_experts))
    largest = float(move_E.abs().max())
    hold(largest <= rounded, f"moves by {largest:.6g}, more than {most:.6g}", move=move_E)


class _CentresTheCounts(Rule):
    """Takes the mean off the counts, which the sign then throws away."""

    centred = True


def _not_centred(subject: ControllerSubject) -> str | None:
    return no_bias(subject) if subject.centred else "it does not say `centred`"


@law(
    "C12",
    "a centred bias keeps its sum",
    formula="sum_e b'_e = sum_e b_e within rounding",
    source="torchtitan models/common/moe.py: the mean of the update is taken off",
    cases=cases,
    broken=lambda: ControllerSubject(_CentresTheCounts()),
    unless=_not_centred,
)
def centred_sum(subject: ControllerSubject, case: Case) -> None:
    move_E = subject.run().step(case).bias_E
    bound = 2 * floor(torch.float32, len(move_E)) * float(move_E.abs().sum())
    hold(move_E.sum().abs() <= bound, f"the sum moves by {float(move_E.sum()):.4g}", move=move_E)


@law(
    "C13",
    "small steps add up in bfloat16",
    formula="after 64 steps a bf16 bias is the fp32 one rounded, from where a step is 1/16 to 1/8 "
    "of what bf16 can tell apart",
    source="0.5 + 1e-3 is 0.5 in bf16; Megatron-LM and NeMo keep the bias in fp32",
    cases=lambda subject: cases(subject, "absent", lengths=(1, 2, 3)),
    broken=lambda: ControllerSubject(Rule()),
    unless=no_bias,
)
def master(subject: ControllerSubject, case: Case) -> None:
    unit = float(subject.run().step(case).bias_E.abs().max())
    if unit == 0:
        return
    start = 2.0 ** math.ceil(math.log2(1024 * unit))
    low, high = (subject.run(dtype, start) for dtype in (torch.bfloat16, torch.float32))
    for _ in range(64):
        low.step(case)
        high.step(case)
    # One unit in the last place, where the master is not fp32 but finer.
    ulp_E = high.bias_E.abs() * 2.0**-7
    hold(
        ((low.bias_E - high.bias_E).abs() <= ulp_E).all(),
        f"64 steps of {unit:.4g} from {start:g}: the bf16 bias does not follow",
        bf16=low.bias_E,
        fp32=high.bias_E,
    )


class _FloatCounts(BiasUpdate):
    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        return super().observe(routing, ctx).float()


def _not_by_sign(subject: ControllerSubject) -> str | None:
    if not subject.moves_by_sign:
        return "it moves by more than the sign: otherwise for one token in thousands than for many"
    return _no_counts(subject)


@law(
    "C14",
    "one token in millions",
    formula="2^24 more choices for every expert change no sign of mean - c_e, where that is 2^-29 "
    "of all choices or more",
    source="fp32 counts whole numbers up to 2^24; a long step on many ranks goes beyond",
    cases=lambda subject: cases(subject, "absent"),
    broken=lambda: ControllerSubject(_FloatCounts(1e-3)),
    unless=_not_by_sign,
)
def exact_counts(subject: ControllerSubject, case: Case) -> None:
    run, plain = subject.run(), subject.run()
    [counts_E] = plain.total(case)
    run.add(case, 2**24)
    got_E, want_E = run.step().bias_E, plain.step(case).bias_E
    # A band of 1e-9 around balance is right, and here it spans more than a token of many experts.
    off_E = (counts_E - counts_E.double().mean()).abs() >= len(counts_E) / 32
    told = "with 2^24 more choices each, the bias moves otherwise"
    hold(torch.equal(got_E[off_E].sign(), want_E[off_E].sign()), told, got=got_E, want=want_E)


LAWS: tuple[Law[ControllerSubject], ...] = (
    rest,
    nothing,
    towards_balance,
    short,
    centred_sum,
    master,
    exact_counts,
)
