"""Laws of losses: kept by moetk's own, each broken by its own broken part, told in plain words."""

import math
from dataclasses import replace

import pytest
import torch

from moetk.context import RouterContext
from moetk.errors import LawBrokenError, MissingFieldError, MoeShapeError, RouterConfigError
from moetk.losses import (
    DeepSeekSequenceLoss,
    GShardLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    RouterZLoss,
)
from moetk.testing.check_losses import LAWS, check_loss
from moetk.testing.law import judge_law
from moetk.testing.laws.losses_subject import LossSubject, Written
from moetk.testing.strategies.losses import PATTERNS, build_case, draw_mask
from tests.testing.drawn import drawn

OWN = {
    "balance": (LoadBalancingLoss(0.5), "switch", "micro_batch"),
    "hf": (LoadBalancingLoss(0.01, normalisation="hf"), "hf", "micro_batch"),
    "sequence": (LoadBalancingLoss(1e-4, scope="sequence"), "switch", "sequence"),
    "ranks": (
        LoadBalancingLoss(2.0, scope="global_batch", reduce=torch.clone),
        "switch",
        "global_batch",
    ),
    "deepseek": (DeepSeekSequenceLoss(1e-4), "switch", "sequence"),
    "gshard": (GShardLoss(0.01), "switch", "micro_batch"),
    "z": (RouterZLoss(1e-3), "z", "token"),
    "importance": (ImportanceLoss(0.1), "variation", "micro_batch"),
    "load": (LoadLoss(0.1), "variation", "micro_batch"),
}
REASONS = {
    "L1": "returned nan",
    "L2": "the gradient of weights_TK has NaN or infinity",
    "L3": "at 2 times the coefficient",
    "L4": ", then ",
    "L5": "logits_TE was changed in place",
    "L6": "the value in torch.",
    "L7": "without the other fields",
    "L8": "the gradient says",
    "L9": "no gradient reaches the logits",
    "L10": "with the experts in the order",
    "L11": "with the experts in the order",
    "L12": "with the tokens in another order",
    "L13": "tokens, against the rest",
    "L14": "label_mask",
    "L15": "nan over no token",
    "L16": "in padding",
    "L17": "micro-batches, weighed by their tokens",
    "L18": "the first sequence's gradient, after others changed",
    "L19": "packed, with sequence_ids",
    "L20": "ranks, weighed by their tokens",
    "L21": 'a "switch" loss with coefficient 1, in balance: 2, not 1',
    "L22": "with one of f and P uniform",
    "L23": "of the score collapsed",
    "L24": "below 1 in balance, though all tokens agree",
    "L25": "is not that of E sum f P with f held fixed",
    "L26": "the gradient of the logits at uniform counts",
    "L27": "the gradient after a capacity",
    "L28": "the value",
    "L29": "the gradient of the logits: off by",
    "L30": "at log-sums of",
    "L31": "with every token on 2 of 8 experts",
    "L32": "with every token",
    "L33": "the value: ",
}


@pytest.mark.parametrize("name", OWN)
def test_moetks_own_losses_keep_every_law_that_speaks_about_them(name):
    loss, like, scope = OWN[name]
    subject = LossSubject(loss)
    assert (subject.like, subject.scope) == (like, scope)
    report = check_loss(loss, **drawn())
    kept = {outcome.law.number for outcome in report.having("kept")}
    always = {f"L{number}" for number in range(1, 17)}
    by_form = {
        "switch": {f"L{number}" for number in range(21, 28)},
        "hf": {f"L{number}" for number in range(21, 28)},
        "z": {"L28", "L29", "L30"},
        "variation": {"L31", "L32"},
    }
    by_scope = {
        "token": {"L17"},
        "sequence": {"L17", "L18", "L19"},
        "micro_batch": set(),
        "global_batch": {"L20"},
    }
    assert kept == always | by_form[like] | by_scope[scope]
    assert all(outcome.reason for outcome in report.having("not applicable"))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (3, 3), (128, 8)])
@pytest.mark.parametrize("name", OWN)
def test_they_keep_them_at_other_sizes(name, num_experts, top_k):
    check_loss(OWN[name][0], num_experts=num_experts, top_k=top_k, examples=2)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.number)
def test_every_law_is_broken_by_its_broken_part(law):
    outcome = judge_law(law, law.broken(), examples=50)
    assert outcome.status == "broken"
    assert REASONS[law.number] in outcome.reason
    assert outcome.case is not None and len(outcome.case["logits_TE"]) <= 33


def test_laws_are_numbered_once_and_say_where_they_are_from():
    numbers = [law.number for law in LAWS]
    assert numbers == [f"L{number}" for number in range(1, len(LAWS) + 1)]
    assert set(numbers) == set(REASONS)
    assert all(law.formula and law.source and law.title for law in LAWS)


def token_entropy(routing, ctx):
    """Mean entropy of a token's scores: no form that the laws know."""
    scores_TE = routing.scores_TE.float()
    counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
    entropy_T = -torch.special.xlogy(scores_TE, scores_TE.clamp(min=1e-30)).sum(-1)
    if counted_T is None:
        counted_T = torch.ones(len(scores_TE), dtype=torch.bool)
    return torch.where(counted_T, entropy_T, 0).sum() / counted_T.sum().clamp(min=1)


def test_a_right_loss_of_an_unknown_form_is_not_blamed():
    """A plain function, without anything said of itself."""
    report = check_loss(token_entropy, examples=10)
    assert report.what == "token_entropy" and report.ok
    assert LossSubject(token_entropy).like is None
    reasons = {outcome.law.number: outcome.reason for outcome in report.having("not applicable")}
    assert "does not say what it `reads`" in reasons["L7"]
    assert "no number `coefficient`" in reasons["L3"] and "no number" in reasons["L21"]
    assert "its scope is micro_batch" in reasons["L17"]
    assert 'say like="switch"' in reasons["L22"]


def test_what_a_loss_says_of_itself_is_believed_and_checked():
    said = Written(token_entropy, scope="token", ordered=True, experts_differ=True)
    kept = {outcome.law.number for outcome in check_loss(said, examples=10).having("kept")}
    assert not kept & {"L10", "L11", "L12", "L13", "L14", "L17", "L19"}
    kept = check_loss(Written(token_entropy, scope="token"), examples=10).having("kept")
    assert "L17" in {outcome.law.number for outcome in kept}
    with pytest.raises(LawBrokenError, match=r"(?s)breaks 6 of 33.*L22 .*L23 ") as caught:
        check_loss(Written(token_entropy), like="switch", examples=5)
    assert numbers_of(caught) == {"L21", "L22", "L23", "L25", "L26", "L33"}


def test_a_short_loss_is_told_by_the_smallest_case():
    def switch_without_mask(routing, ctx):
        return LoadBalancingLoss(0.01)(routing, RouterContext())

    with pytest.raises(LawBrokenError, match=r"breaks [234] of 33 laws") as caught:
        check_loss(switch_without_mask, examples=10)
    assert {"L13", "L14", "L16"} <= numbers_of(caught) <= {"L13", "L14", "L15", "L16"}


def numbers_of(caught):
    return {outcome.law.number for outcome in caught.value.report.having("broken")}


def mean_over(values_TX, ctx):
    """The mean over the counted tokens; 0 where there are none."""
    counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
    if counted_T is None:
        return values_TX.sum(0) / max(len(values_TX), 1)
    mask = counted_T.view(-1, *[1] * (values_TX.ndim - 1))
    return torch.where(mask, values_TX, 0).sum(0) / counted_T.sum().clamp(min=1)


def textbook_switch(routing, ctx, ids=None):
    """E sum f P, with P the mean of scores as they are: half of nothing is made of sigmoids."""
    ids = routing.experts_TK if ids is None else ids
    chosen_TE = torch.zeros(routing.scores_TE.shape).scatter_add(
        1, ids.clamp(min=0), (ids >= 0).float()
    )
    counts_E = mean_over(chosen_TE, ctx)
    shares_E = counts_E / counts_E.sum().clamp(min=1e-9)
    return routing.num_experts * (shares_E * mean_over(routing.scores_TE.float(), ctx)).sum()


def squared_logits(routing, ctx):
    return mean_over(routing.logits_TE.float().square().mean(-1), ctx)


def divergence_from_uniform(routing, ctx):
    """0 in balance, up to rounding: there is no size in it to measure rounding by."""
    mean_E = mean_over(routing.logits_TE.float().softmax(-1), ctx)
    # Off zero: of a share that has underflowed, 0 / 0 would be the gradient.
    return torch.special.xlogy(mean_E, mean_E * routing.num_experts + 1e-20).sum()


@pytest.mark.parametrize(
    ("loss", "like"),
    [(textbook_switch, "switch"), (squared_logits, None), (divergence_from_uniform, "variation")],
)
def test_right_losses_as_users_write_them_are_not_blamed(loss, like):
    assert LossSubject(loss).like == like
    check_loss(loss, examples=15)
    check_loss(loss, like="none", examples=3)


def test_the_bound_is_of_ordinary_values_not_of_the_hugest():
    subject = LossSubject(squared_logits)
    assert subject.scale < 10
    assert not subject.near(torch.tensor(0.5), torch.tensor(1.0))


def test_a_loss_in_the_order_of_its_tokens_declares_it():
    def neighbours(routing, ctx):
        """Neighbours of a sequence should be routed alike."""
        batch, length = ctx.require("batch_shape", neighbours)
        counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
        scores_TE = routing.scores_TE.float()
        if counted_T is None:
            counted_T = torch.ones(len(scores_TE), dtype=torch.bool)
        scores_TE = torch.where(counted_T[:, None], scores_TE, 0)
        both = counted_T.view(batch, length).unfold(1, 2, 1).all(-1) if length > 1 else None
        if both is None or not both.any():
            return scores_TE.sum() * 0
        steps = scores_TE.view(batch, length, -1).diff(dim=1).square().sum(-1)
        return torch.where(both, steps, 0).sum() / both.sum()

    with pytest.raises(LawBrokenError) as caught:
        check_loss(neighbours, examples=10)
    assert numbers_of(caught) >= {"L12", "L14"}
    neighbours.ordered = True
    check_loss(neighbours, examples=10)


def of_the_weights(routing, ctx):
    """P of what the chosen get, not of the scores."""
    used = routing.experts_TK >= 0
    weights_TE = torch.zeros(routing.scores_TE.shape).scatter_add(
        1, routing.experts_TK.clamp(min=0), torch.where(used, routing.weights_TK.float(), 0)
    )
    return textbook_switch(replace(routing, scores_TE=weights_TE), ctx)


MEANT_TO_BE = {
    "E times too much": ("switch", lambda r, c: r.num_experts * textbook_switch(r, c)),
    "K times too much": ("switch", lambda r, c: r.experts_TK.shape[1] * textbook_switch(r, c)),
    "K times too little": ("hf", textbook_switch),
    "rewarded": ("switch", lambda r, c: -textbook_switch(r, c)),
    "P P": ("switch", lambda r, c: r.num_experts * mean_over(r.scores_TE, c).square().sum()),
    "P of the weights": ("switch", of_the_weights),
    "of the first": ("switch", lambda r, c: textbook_switch(r, c, r.experts_TK[:, :1])),
    "of the best": ("switch", lambda r, c: textbook_switch(r, c, r.scores_TE.topk(2, -1).indices)),
    "z rewarded": ("z", lambda r, c: -mean_over(r.logits_TE.logsumexp(-1).square(), c)),
}


@pytest.mark.parametrize("name", MEANT_TO_BE)
def test_what_is_meant_to_be_a_form_is_held_to_it(name):
    like, loss = MEANT_TO_BE[name]
    with pytest.raises(LawBrokenError) as caught:
        check_loss(loss, like=like, examples=5)
    assert numbers_of(caught) & {"L21", "L28", "L33"}


def test_a_form_that_is_meant_has_the_factor_that_is_told():
    def weighed(routing, ctx):
        return 0.01 * textbook_switch(routing, ctx)

    check_loss(weighed, like="switch", coefficient=0.01, examples=10)
    check_loss(LoadBalancingLoss(0.01, scope="sequence"), like="switch", examples=10)
    check_loss(LoadBalancingLoss(0.5, normalisation="hf"), like="hf", examples=10)
    with pytest.raises(
        LawBrokenError, match=r"L21 .*coefficient= says another\), in balance: 0\.00999"
    ) as caught:
        check_loss(weighed, like="switch", examples=10)
    report = caught.value.report
    assert report.arguments["told"] == "switch" and report.arguments["factor"] is None


def test_a_check_leaves_the_loss_and_the_random_numbers_alone():
    class Counts(torch.nn.Module):
        reads = ("logits_TE",)

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, routing, ctx):
            self.calls += 1
            return RouterZLoss(1.0)(routing, ctx)

    loss, state = Counts(), torch.get_rng_state()
    check_loss(loss, examples=3)
    assert loss.calls == 0 and torch.equal(torch.get_rng_state(), state)

    def draws(routing, ctx):
        return RouterZLoss(1.0)(routing, ctx) + 0 * torch.rand(())

    with pytest.raises(LawBrokenError, match="L5 .*it draws random numbers"):
        check_loss(draws, examples=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_loss_is_told_so():
    with pytest.raises(RouterConfigError, match=r"RouterZLoss is a class; pass a loss, check_loss"):
        check_loss(RouterZLoss)
    with pytest.raises(RouterConfigError, match=r"called as loss\(routing, ctx\), and takes \(r\)"):
        check_loss(lambda r: r.scores_TE.sum())
    with pytest.raises(RouterConfigError, match=r"object cannot be called; a loss is called as"):
        check_loss(object())


def test_errors_say_what_to_do():
    loss = RouterZLoss(1.0)
    with pytest.raises(RouterConfigError, match=r"check_loss: top_k=3 but num_experts=2; need 1"):
        check_loss(loss, num_experts=2, top_k=3)
    with pytest.raises(RouterConfigError, match=r"like='gshard'; it is one of switch, hf, z, var"):
        check_loss(loss, like="gshard")
    with pytest.raises(MoeShapeError, match=r"_pair returned \(2,\); a loss returns a scalar"):
        check_loss(_pair)
    with pytest.raises(MoeShapeError, match=r"_number returned float; a loss returns a scalar"):
        check_loss(_number)
    with pytest.raises(MissingFieldError, match=r"a loss of mine reads nulls_T"):
        check_loss(_needs_more)


def _pair(routing, ctx):
    return torch.zeros(2)


def _number(routing, ctx):
    return 0.0


def _needs_more(routing, ctx):
    from moetk.routing import need

    return need(routing, "nulls_T", "a loss of mine").sum()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_what_they_say(pattern):
    def draw(T, E):
        return PATTERNS[pattern](torch.Generator().manual_seed(0), T, E)

    for T, E in [(0, 3), (1, 1), (5, 3), (16, 8)]:
        assert draw(T, E).shape == (T, E) and draw(T, E).dtype == torch.float64
        assert draw(T, E).isfinite().all()
    x_TE = draw(16, 8)
    gaps_TE = x_TE.sort(-1).values.diff()
    chosen_E = torch.bincount(x_TE.argmax(-1), minlength=8)
    said = {
        "gaussian": gaps_TE.min() > 0,
        "spaced": gaps_TE.min() == 0.5,
        "huge": x_TE.abs().max() > 1e4,
        "tiny": 0 < x_TE.abs().max() < 1e-5,
        "equal": not x_TE.any(),
        "pairs": torch.equal(x_TE[:, ::2], x_TE[:, 1::2]),
        "signed zeros": not x_TE.any() and x_TE.signbit().any() and not x_TE.signbit().all(),
        "one ulp": 0 < gaps_TE.max() <= 2 * torch.finfo(torch.float32).eps,
        "sorted": (x_TE.diff() < 0).all(),
        "one-hot": chosen_E.max() == 16,
        "starved": chosen_E[4:].sum() == 0,
        "rotated": (chosen_E == 2).all(),
    }
    assert said[pattern]


def test_masks_are_what_they_say():
    g = torch.Generator().manual_seed(0)
    masks = {kind: draw_mask(g, kind, 3, 8) for kind in ("padding", "columns", "scattered")}
    rows = {kind: mask.view(3, 8) for kind, mask in masks.items()}
    assert (rows["padding"].int().diff() <= 0).all() and not masks["padding"].all()
    assert (rows["columns"] == rows["columns"][0]).all() and 0 < masks["columns"].sum() < 24
    assert 0 < masks["scattered"].sum() < 24
    assert draw_mask(g, "all", 2, 3).all() and not draw_mask(g, "none", 2, 3).any()


def test_a_given_choice_comes_first_in_its_order():
    ids = torch.tensor([[2, 0], [1, 2]])
    logits_TE = torch.tensor([[0.0, 1, 2], [3, 0, 1]], dtype=torch.float64)
    case = build_case(logits_TE, 2, experts_TK=ids)
    assert torch.equal(case["choice_TE"].topk(2, -1).indices, ids)
    assert torch.equal(case["weights_TK"], case["scores_TE"].gather(-1, ids))
    assert math.isclose(float(case["scores_TE"].sum()), 2, rel_tol=1e-6)
