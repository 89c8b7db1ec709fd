"""Laws of controllers: kept by moetk's own and by right ones of other kinds, each broken by its
own broken part."""

import pytest
import torch
from torch import nn

from moetk.controllers import BiasUpdate
from moetk.errors import LawBrokenError, RouterConfigError
from moetk.kernels.counting import count_choices
from moetk.testing.check_controllers import LAWS, check_controller
from moetk.testing.law import judge_law
from moetk.testing.laws.controllers_subject import ControllerSubject
from tests.testing.drawn import drawn

OWN = {
    "plain": BiasUpdate(1e-3),
    "centred": BiasUpdate(1e-3, centred=True),
    "scheduled": BiasUpdate(lambda step: 1e-2 if step < 2 else 1e-3),
}
REASONS = {
    "C1": "2 micro-batches against one",
    "C2": "after the same tokens in another order",
    "C3": "with padding masked, against padding removed",
    "C4": "with the experts in the order",
    "C5": "with the experts in the order",
    "C6": "after a capacity",
    "C7": "a step after observations that were not committed",
    "C8": "equal counts, and it moves",
    "C9": "no token, and it moves",
    "C10": "an overloaded expert rises",
    "C11": "more than 0.000976562",
    "C12": "the sum moves by",
    "C13": "the bf16 bias does not follow",
    "C14": "with 2^24 more choices each",
    "C15": "resumed after",
    "C16": "the original, after a step of its copy",
    "C17": "two copies: router.e_score_correction_bias differs",
    "C18": "what was observed was changed in place",
    "C19": "steps unbound without an error",
    "C20": "128 steps with all tokens on the first experts, and these do not fall",
    "C21": "then all tokens on other experts, and nothing moves",
    "C22": "its rate is 0.0009766",
    "C23": "empty experts do not rise",
    "C24": "one step moves two biases apart by",
}
NUMBERS = {law.number for law in LAWS}


@pytest.mark.parametrize("name", OWN)
def test_moetks_own_controllers_keep_every_law(name):
    report = check_controller(OWN[name], **drawn())
    silent = {"C24"} if name == "centred" else {"C12", "C24"}
    assert {outcome.law.number for outcome in report.having("kept")} == NUMBERS - silent
    assert all(outcome.reason for outcome in report.having("not applicable"))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 3), (5, 1), (16, 6)])
def test_they_keep_them_at_other_sizes(num_experts, top_k):
    for controller in OWN.values():
        check_controller(controller, num_experts=num_experts, top_k=top_k, examples=2)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.number)
def test_every_law_is_broken_by_its_broken_part(law):
    outcome = judge_law(law, law.broken(), examples=50)
    assert outcome.status == "broken"
    assert REASONS[law.number] in outcome.reason


def test_laws_are_numbered_once_and_say_where_they_are_from():
    numbers = [law.number for law in LAWS]
    assert numbers == [f"C{number}" for number in range(1, len(LAWS) + 1)]
    assert set(numbers) == set(REASONS)
    assert all(law.formula and law.source and law.title for law in LAWS)


class Steering:
    """What the controllers below share: a bias in fp64, written to the router after a step."""

    def bind(self, router):
        self.router = router
        self.bias_E = router.e_score_correction_bias.double()

    def state_dict(self):
        return {"bias": self.bias_E.clone()}

    def load_state_dict(self, state):
        self.bias_E = state["bias"].clone()

    @torch.no_grad()
    def write(self):
        self.router.e_score_correction_bias.copy_(self.bias_E)


class Proportional(Steering):
    """As far as the load is off: arXiv 2509.01322."""

    accumulate = "sum"

    def observe(self, routing, ctx):
        return count_choices(routing.experts_TK, routing.num_experts, ctx.token_mask)[0]

    def step(self, observed):
        shares_E = observed / observed.sum().clamp(min=1)
        if observed.any():
            self.bias_E = self.bias_E + 0.01 * (1 / len(shares_E) - shares_E)
        self.write()


class Band(Proportional):
    """At rest within a tenth of balance."""

    def step(self, observed):
        off_E = observed.double() * len(observed) - observed.sum()
        self.bias_E = self.bias_E - 1e-3 * off_E.sign() * (off_E.abs() > 0.1 * observed.sum())
        self.write()


class Average(Proportional):
    """The sign of a running average of shares, with a tolerance for its rounding."""

    def bind(self, router):
        super().bind(router)
        self.shares_E = None

    def step(self, observed):
        if observed.any():
            shares_E = observed.double() / observed.sum()
            old_E = shares_E if self.shares_E is None else self.shares_E
            self.shares_E = 0.9 * old_E + 0.1 * shares_E
            off_E = 1 / len(observed) - self.shares_E
            self.bias_E = self.bias_E + 1e-3 * off_E.sign() * (off_E.abs() > 1e-9)
        self.write()

    def state_dict(self):
        shares = {} if self.shares_E is None else {"shares": self.shares_E.clone()}
        return {**super().state_dict(), **shares}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.shares_E = state["shares"].clone() if "shares" in state else None


class Clamped(Proportional):
    """No bias goes further than a tenth, where the 128 steps of a collapse bring it."""

    def step(self, observed):
        off_E = observed.sum() - observed * len(observed)
        self.bias_E = (self.bias_E + 1e-3 * off_E.sign()).clamp(-0.1, 0.1)
        self.write()


class Quantile(Steering):
    """Each expert's own threshold, from all scores of the step."""

    accumulate = "cat"

    def observe(self, routing, ctx):
        scores_TE = routing.scores_TE
        return scores_TE if ctx.token_mask is None else scores_TE[ctx.token_mask]

    def step(self, observed):
        if len(observed):
            self.bias_E = -observed.double().quantile(0.75, dim=0)
        self.write()


class Sparsity:
    """A loss's weight that grows while too many experts are used: it moves no router."""

    accumulate = "sum"

    def __init__(self):
        self.weight = 1e-3

    def observe(self, routing, ctx):
        chosen = count_choices(routing.experts_TK, routing.num_experts, ctx.token_mask)
        return chosen.sum(), torch.tensor(len(routing.experts_TK))

    def step(self, observed):
        self.weight *= 1.2 if observed[0] > observed[1] else 1 / 1.2

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = float(state["weight"])


@pytest.mark.parametrize(
    ("controller", "silent"),
    [
        (Proportional(), {"C11", "C12", "C14", "C22"}),
        (Quantile(), {"C6", "C8", "C9", "C10", "C11", "C12", "C14", "C22", "C23", "C24"}),
        (Band(), {"C11", "C12", "C14", "C22"}),
        (Average(), {"C11", "C12", "C22"}),
        (Clamped(), {"C11", "C12", "C22"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_right_controllers_of_other_kinds_are_not_blamed(controller, silent):
    report = check_controller(controller, examples=8)
    assert {outcome.law.number for outcome in report.having("kept")} == NUMBERS - silent


def test_a_controller_that_moves_no_router_is_not_asked_about_one():
    # Padding counts as tokens in its second number, so C3 speaks.
    with pytest.raises(LawBrokenError, match=r"breaks 1 of 24 laws:\n  C3 padding") as caught:
        check_controller(Sparsity(), examples=8)
    kept = {outcome.law.number for outcome in caught.value.report.having("kept")}
    assert kept == {"C1", "C2", "C7", "C15", "C16", "C17"}


def test_a_router_of_ones_own_is_steered():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("e_score_correction_bias", torch.zeros(4))
            self.scale = nn.Parameter(torch.ones(()))

    class AlsoTheScale(BiasUpdate):
        def step(self, observed):
            super().step(observed)
            self._router.scale.data.mul_(0.99)

    check_controller(BiasUpdate(0.1), num_experts=4, router=Named, examples=5)
    with pytest.raises(LawBrokenError, match=r"C18 .*router.scale moves"):
        check_controller(AlsoTheScale(0.1), num_experts=4, router=Named, examples=5)


def test_a_rate_of_zero_moves_nothing_and_breaks_nothing():
    assert check_controller(BiasUpdate(0), examples=5).ok
    assert not ControllerSubject(BiasUpdate(0)).moves_by_sign


def test_one_that_only_lowers_declares_it():
    class OnlyDown(Clamped):
        def step(self, observed):
            over_E = observed * len(observed) > observed.sum()
            self.bias_E = self.bias_E - 1e-3 * over_E
            self.write()

    with pytest.raises(LawBrokenError, match="breaks 1 of 24 laws:\n  C23 .*one_sided = True"):
        check_controller(OnlyDown(), examples=5)
    OnlyDown.one_sided = True
    check_controller(OnlyDown(), examples=5)


def test_a_check_leaves_the_controller_and_the_random_numbers_alone():
    class Draws(BiasUpdate):
        calls = 0

        def observe(self, routing, ctx):
            self.calls += 1
            torch.rand(())
            return super().observe(routing, ctx)

    controller, state = Draws(1e-3), torch.get_rng_state()
    with pytest.raises(LawBrokenError, match="C18 .*it draws random numbers"):
        check_controller(controller, examples=3)
    assert controller.calls == 0 and torch.equal(torch.get_rng_state(), state)


def test_what_is_no_controller_is_told_so():
    with pytest.raises(RouterConfigError, match=r"BiasUpdate is a class; pass a controller"):
        check_controller(BiasUpdate)
    with pytest.raises(RouterConfigError, match=r"object has no accumulate, observe, step"):
        check_controller(object())


def test_errors_say_what_to_do():
    with pytest.raises(RouterConfigError, match=r"check_controller: top_k=9 but num_experts=8"):
        check_controller(BiasUpdate(1e-3), top_k=9)
    with pytest.raises(RouterConfigError, match=r"num_experts=0; need a whole number from 1"):
        check_controller(BiasUpdate(1e-3), num_experts=0)
    with pytest.raises(
        RouterConfigError, match=r"e_score_correction_bias, which Identity does not"
    ):
        check_controller(BiasUpdate(1e-3), router=nn.Identity)
    wrong = BiasUpdate(1e-3)
    wrong.accumulate = "mean"
    with pytest.raises(RouterConfigError, match=r'accumulate = \'mean\'; it is "sum" or "cat"'):
        check_controller(wrong)
