"""Each law is kept by right routers, moetk's and users', and broken by the part it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moetk import RouterContext, TokenChoice, routers
from moetk.errors import (
    LawBrokenError,
    MissingContextError,
    MoeDtypeError,
    ReplayError,
    RouterConfigError,
)
from moetk.testing import check_router
from moetk.testing.causality import measure_causality
from moetk.testing.check_routers import ROUTER_LAWS
from moetk.testing.law import Law, judge_law, judge_laws
from moetk.testing.laws.routers_subject import RouterSubject
from moetk.testing.laws.routers_told import matrix_of
from tests.testing.drawn import drawn
from tests.testing.users import (
    RIGHT,
    WRONG,
    CompletesTheContext,
    Cosine,
    ScaledExperts,
    by_table,
)

OWN = {
    "mixtral": lambda: routers.MixtralRouter(8, 8, 2),
    "mixtral, all chosen": lambda: routers.MixtralRouter(6, 5, 5),
    "olmoe, biased": lambda: routers.MixtralRouter(
        6, 4, 2, renormalise=False, choice_bias=True, tie="stock"
    ),
    "deepseek_v3, groups": lambda: routers.DeepSeekV3Router(8, 8, 2, groups=4, top_groups=2),
    "kimi_k2": lambda: routers.catalogue.kimi_k2(8, 16, 3),
    "deepseek_v4": lambda: routers.DeepSeekV4Router(8, 8, 3, tie="stock"),
    "hash": lambda: routers.DeepSeekV4HashRouter(8, 8, 2, vocab_size=8),
    "gpt_oss": lambda: routers.GptOssRouter(8, 8, 4),
    "granitemoe": lambda: routers.catalogue.granitemoe(8, 4, 2),
    "switch": lambda: routers.SwitchRouter(8, 8, 1),
    "switch, two": lambda: routers.SwitchRouter(5, 4, 2, capacity_factor=0.5),
    "noisy": lambda: routers.NoisyTopKRouter(8, 8, 2),
    "expert_choice": lambda: routers.ExpertChoiceRouter(8, 8, 2),
    "soft": lambda: routers.SoftMoERouter(8, 4, 2),
    "one expert": lambda: routers.MixtralRouter(3, 1, 1),
}

REASONS = {
    "R1": "an id outside -1..3: [4",
    "R2": "an expert twice",
    "R3": "are not finite on finite input",
    "R4": "unused or dropped choices weigh",
    "R5": "max(): Expected reduction dim",
    "R6": "when called twice with the same input",
    "R7": "instead of 0, in evaluation",
    "R8": "17 neighbouring seeds",
    "R9": "x_TH was changed in place",
    "R10": "e_score_correction_bias is another after a forward",
    "R11": "when x_TH is sliced",
    "R12": "when its state was loaded",
    "R13": "have choice scores",
    "R14": "are chosen from",
    "R15": "but top_groups=2",
    "R16": "of 2 x",
    "R17": "goes to",
    "R18": "when experts are renamed",
    "R19": "when tokens change places",
    "R20": "was added to the whole e_score_correction_bias",
    "R21": "while another kept",
    "R22": "its capacity is",
    "R23": "where each expert has room for all",
    "R24": "tokens of the 2 sequences, its share is",
    "R25": "leaves tokens of score",
    "R26": "of scores that are all at least 0",
    "R27": "weigh",
    "R28": "under another choice bias",
    "R29": "over the tokens",
    "R30": "weights in bfloat16 are off by",
    "R31": "of the batch stays",
    "R32": "when padding holds other numbers",
    "R33": "when only packed sequence",
    "R34": "holds nan",
    "R35": "pass the choice through ctx.replayed",
    "R36": "replayed in reverse",
    "R37": "the weights' gradient reaches e_score_correction_bias",
    "R38": "K = 1 and a rescaled weight",
    "R39": "the difference quotient",
    "R40": "have a gradient in tokens",
    "R41": "have scores",
    "R42": "the choice falls where the scores rise",
    "R43": "logits_TE has no graph to the parameters",
    "R44": "raised by 10000.0",
    "R45": "none of a group whose scores are all better",
    "R46": "when it is alone in its batch",
    "R47": "when it is in training (where that is on purpose",
    "R48": "8 equal tokens are routed the same",
    "R49": "not finite in torch.float32",
}


def subject_of(build: Any) -> RouterSubject:
    torch.manual_seed(0)
    return RouterSubject(build())


def test_laws_have_one_number_each_and_say_where_they_are_from() -> None:
    assert [law.number for law in ROUTER_LAWS] == list(REASONS)
    assert all(law.title and law.formula and law.source for law in ROUTER_LAWS)


@pytest.mark.parametrize("name", OWN)
def test_moetks_routers_keep_every_law(name: str) -> None:
    outcomes = judge_laws(ROUTER_LAWS, subject_of(OWN[name]), **drawn())
    assert {one.law.number: one.reason for one in outcomes if one.status == "broken"} == {}


@pytest.mark.parametrize("router", RIGHT, ids=lambda router: getattr(router, "__name__", None))
def test_right_routers_of_users_are_not_blamed(router: Any) -> None:
    subject = RouterSubject(router, hidden_size=5 if router is by_table else None)
    outcomes = judge_laws(ROUTER_LAWS, subject, examples=6)
    assert {one.law.number: one.reason for one in outcomes if one.status == "broken"} == {}


@pytest.mark.parametrize("law", ROUTER_LAWS, ids=lambda law: law.number)
def test_each_law_is_broken_by_its_broken_part(law: Law[RouterSubject]) -> None:
    outcome = judge_law(law, law.broken(), examples=50)
    assert outcome.status == "broken"
    assert REASONS[law.number] in outcome.reason


@pytest.mark.parametrize("law", ROUTER_LAWS, ids=lambda law: law.number)
def test_each_law_speaks_about_a_router_of_moetk(law: Law[RouterSubject]) -> None:
    assert any(law.unless(subject_of(build)) is None for build in OWN.values())


def test_a_router_without_noise_is_not_asked_for_any() -> None:
    subject = RouterSubject(CompletesTheContext(Cosine(6, 5, 2)))
    assert not subject.draws_noise
    (law,) = [law for law in ROUTER_LAWS if law.number == "R8"]
    assert law.unless(subject) == "another ctx.seed changes nothing: it draws no noise"


def test_experts_that_differ_undeclared_are_told_what_to_declare() -> None:
    class Undeclared(ScaledExperts):
        experts_differ = False

    (law,) = [law for law in ROUTER_LAWS if law.number == "R27"]
    reason = judge_law(law, RouterSubject(Undeclared()), examples=20).reason
    assert reason.endswith("declare experts_differ = True")


@pytest.mark.parametrize(("router", "number", "told"), WRONG, ids=lambda one: str(one)[:20])
def test_a_law_sees_more_than_its_broken_part(router: Any, number: str, told: str) -> None:
    (law,) = [law for law in ROUTER_LAWS if law.number == number]
    outcome = judge_law(law, RouterSubject(router), examples=30)
    assert outcome.status == "broken" and told in outcome.reason
    assert torch.is_grad_enabled()


# -- causality


@pytest.mark.parametrize(
    ("name", "evaluation", "training"),
    [
        ("mixtral", True, True),
        ("noisy", True, True),
        ("switch", True, True),
        ("switch, two", False, False),  # a later first choice goes before an earlier second one
        ("expert_choice", False, False),
        ("soft", False, False),
    ],
)
def test_causality_is_measured(name: str, evaluation: bool, training: bool) -> None:
    told = measure_causality(subject_of(OWN[name]))
    assert (told.evaluation, told.training) == (evaluation, training)
    assert bool(told) == (evaluation and training)


def test_causality_in_training_alone_is_seen() -> None:
    (sinkhorn,) = [router for router in RIGHT if type(router).__name__ == "Sinkhorn"]
    told = measure_causality(RouterSubject(sinkhorn))
    assert (told.evaluation, told.training) == (True, False)
    assert str(told) == "in evaluation causal, in training sees later tokens"


def test_a_function_has_no_training_mode() -> None:
    told = measure_causality(RouterSubject(by_table, hidden_size=5))
    assert (told.evaluation, told.training) == (True, None) and bool(told)


# -- the front door


def test_a_router_is_checked_in_one_line_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    router = routers.NoisyTopKRouter(8, 8, 2)
    router.weight.grad = torch.ones_like(router.weight)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    state = torch.get_rng_state()
    report = check_router(router, examples=2)
    assert report.ok and report.causal and report.what == "NoisyTopKRouter"
    assert torch.equal(torch.get_rng_state(), state)
    assert router.training and bool((router.weight.grad == 1).all())
    assert router.noise_weight.grad is None
    assert router.gemm_dtype is None and router.score_dtype == torch.float32
    for name, tensor in router.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_broken_router_raises_with_its_report() -> None:
    torch.manual_seed(0)
    router = routers.GptOssRouter(8, 8, 1)
    with pytest.raises(LawBrokenError, match="GptOssRouter breaks 1 of 49 laws") as raised:
        check_router(router, examples=2)
    report = raised.value.report
    assert not report.ok
    (broken,) = report.having("broken")
    assert broken.law.number == "R38"
    assert broken.shown["routing_TE"].shape == (13, 8)


def test_a_function_that_ignores_a_replay_is_told_so() -> None:
    def first_expert(x_TH: torch.Tensor, ctx: RouterContext) -> TokenChoice:
        experts_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64)
        return TokenChoice(experts_TK, torch.ones(len(x_TH), 1), num_experts=8)

    with pytest.raises(LawBrokenError, match=r"breaks 1 of 49 laws:\n  R35 a replay is obeyed"):
        check_router(first_expert, hidden_size=4, examples=2)


def test_a_declared_refusal_of_replays_is_believed() -> None:
    def refuses(x_TH: torch.Tensor, ctx: RouterContext) -> TokenChoice:
        if ctx.replay is not None:
            raise ReplayError("not here")
        experts_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64)
        return TokenChoice(experts_TK, torch.ones(len(x_TH), 1), num_experts=8)

    outcomes = {o.law.number: o for o in check_router(refuses, hidden_size=4, examples=2).outcomes}
    assert outcomes["R35"].reason == "it refuses a replay with ReplayError, as it may"


def test_a_width_that_cannot_be_read_off_is_asked_for() -> None:
    with pytest.raises(RouterConfigError, match=r"by_table does not say how wide .* hidden_size="):
        check_router(by_table)
    router = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(RouterConfigError, match=r"its matrices have widths \[3, 4\]"):
        check_router(router)  # type: ignore[arg-type]


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(RouterConfigError, match=r"x_TH \(12, 3\).*Is hidden_size=3 its width"):
        check_router(Cosine(6, 5, 2), hidden_size=3)


def test_a_context_that_no_check_can_draw_is_named() -> None:
    def continues(x_TH: torch.Tensor, ctx: RouterContext) -> TokenChoice:
        previous = ctx.require("previous")
        assert isinstance(previous, TokenChoice)
        return previous

    with pytest.raises(RouterConfigError, match="needs what no check can draw") as raised:
        check_router(continues, hidden_size=4)
    assert isinstance(raised.value.__cause__, MissingContextError)


def test_a_number_of_experts_that_differs_breaks_the_first_law() -> None:
    with pytest.raises(LawBrokenError, match="R1 .*num_experts=5 in the routing, but there are 6"):
        check_router(Cosine(6, 5, 2), num_experts=6, examples=1)


@pytest.mark.parametrize(
    ("router", "told"),
    [
        (Cosine, r"Cosine is a class; check a router that is made of it: Cosine\(...\)"),
        (None, "None is not a router: a router is called as"),
    ],
)
def test_what_is_no_router_is_refused(router: Any, told: str) -> None:
    with pytest.raises(RouterConfigError, match=told):
        check_router(router)


@pytest.mark.parametrize(("answer", "kind"), [((1, 2), "tuple"), (None, "NoneType")])
def test_what_is_no_routing_is_refused(answer: Any, kind: str) -> None:
    with pytest.raises(MoeDtypeError, match=f"answers returned {kind}; a router returns"):

        def answers(x_TH: torch.Tensor, ctx: RouterContext) -> Any:
            return answer

        check_router(answers, hidden_size=4)


def test_a_number_of_experts_is_a_number() -> None:
    with pytest.raises(RouterConfigError, match="num_experts='8' is not a whole number"):
        check_router(Cosine(6, 5, 2), num_experts="8")  # type: ignore[arg-type]


def test_a_check_of_a_router_that_draws_from_the_global_leaves_it_alone() -> None:
    class DrawsAlways(Cosine):
        def forward(self, x_TH: torch.Tensor, ctx: RouterContext) -> TokenChoice:
            return super().forward(x_TH + 0.01 * torch.randn_like(x_TH), ctx)

    router, reasons = DrawsAlways(6, 5, 2), []
    for seed in (5, 7):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with pytest.raises(LawBrokenError, match="DrawsAlways breaks") as raised:
            check_router(router, examples=2)
        assert torch.equal(torch.get_rng_state(), state)
        reasons.append([one.reason for one in raised.value.report.having("broken")])
    assert reasons[0] == reasons[1]


def test_a_router_that_cannot_be_copied_is_named() -> None:
    router = Cosine(6, 5, 2)
    router.lock = (one for one in ())  # type: ignore[assignment]
    with pytest.raises(RouterConfigError, match="Cosine cannot be copied .*generator"):
        check_router(router)


# -- the matrix


def test_the_matrix_of_a_token_choice_has_nan_where_nothing_goes() -> None:
    ids_TK, weights_TK = torch.tensor([[1, -1], [0, 0]]), torch.tensor([[0.5, 0.0], [0.25, 0.5]])
    matrix_TE = matrix_of(TokenChoice(ids_TK, weights_TK, 3))
    nan = float("nan")
    expected = torch.tensor([[nan, 0.5, nan], [0.75, nan, nan]], dtype=torch.float64)
    assert torch.equal(matrix_TE.nan_to_num(-1), expected.nan_to_num(-1))


def test_the_matrix_of_an_expert_choice_is_turned_to_tokens() -> None:
    from moetk import ExpertChoice

    routing = ExpertChoice(
        torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.5, 0.2], [0.3, 0.0]]), 3
    )
    expected = torch.tensor([[0.2, -1], [-1, 0.3], [0.5, -1]], dtype=torch.float64)
    torch.testing.assert_close(matrix_of(routing).nan_to_num(-1), expected, rtol=1e-6, atol=0)
