"""The bias controller: its rule, what it counts, its precision, copies, resume, outside writes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moetk.context import RouterContext
from moetk.controllers import BiasUpdate
from moetk.errors import (
    MissingTensorError,
    MoeShapeError,
    RouterConfigError,
    UnexpectedTensorError,
    UnsupportedRoutingError,
)
from moetk.routing import ExpertChoice, TokenChoice

ANY = RouterContext()


class BiasedRouter(nn.Module):
    """Sigmoid scores plus bias, the best K; the bias in any dtype."""

    def __init__(self, num_experts: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=dtype))

    def forward(self, logits_TE: torch.Tensor, top_k: int) -> TokenChoice:
        scores_TE = logits_TE.sigmoid()
        experts_TK = (scores_TE + self.e_score_correction_bias).topk(top_k, -1).indices
        return TokenChoice(experts_TK, scores_TE.gather(-1, experts_TK), logits_TE.shape[-1])


class Block(nn.Module):
    """Holds a router, and a controller as a plain attribute, as a layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.router = BiasedRouter()
        self.controllers = (bound(self.router),)


def bound(router: nn.Module, rate: float = 1e-3, **options) -> BiasUpdate:
    controller = BiasUpdate(rate, **options)
    controller.bind(router)
    return controller


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@settings(max_examples=30)
@given(
    steps=st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), min_size=1, max_size=5),
    centred=st.booleans(),
)
def test_the_rule_against_plain_python(steps, centred):
    """To the bit: a rate of 2^-6 and the mean over four experts are exact in binary."""
    router = BiasedRouter(4)
    controller = bound(router, 2**-6, centred=centred)
    want = [0.0] * 4
    for step in steps:
        mean = sum(step) / 4
        move = [2**-6 * ((mean > c) - (mean < c)) for c in step]
        off = sum(move) / 4 if centred else 0.0
        want = [b + m - off for b, m in zip(want, move, strict=True)]
        controller.step(counts(*step))
    assert router.e_score_correction_bias.tolist() == want
    if centred:
        assert sum(want) == 0


def test_zero_and_equal_counts_move_nothing():
    router = BiasedRouter()
    controller = bound(router, 1.0)
    controller.step(counts(0, 0, 0, 0))
    controller.step(counts(7, 7, 7, 7))
    assert not router.e_score_correction_bias.any()


def test_the_sign_is_exact_where_a_fp32_mean_rounds():
    router = BiasedRouter(2)
    bound(router, 1.0).step(counts(2**25 + 1, 2**25))
    assert router.e_score_correction_bias.tolist() == [-1.0, 1.0]


def test_observe_counts_unmasked_choices_before_capacity():
    routing = TokenChoice(
        torch.tensor([[0, 1], [0, -1], [3, 0], [2, 1]]),
        torch.zeros(4, 2),
        4,
        kept_TK=torch.zeros(4, 2, dtype=torch.bool),
    )
    controller = BiasUpdate(1e-3)
    got = controller.observe(routing, ANY)
    assert got.tolist() == [3, 2, 1, 1] and got.dtype == torch.int64
    mask = torch.tensor([True, True, True, False])
    labels = torch.tensor([True, False, False, False])
    ctx = RouterContext(token_mask=mask, label_mask=labels)  # labels are a matter of losses
    assert controller.observe(routing, ctx).tolist() == [3, 1, 0, 1]
    empty = TokenChoice(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 4)
    assert controller.observe(empty, ANY).tolist() == [0, 0, 0, 0]


def test_observe_traces_whole():
    routing = BiasedRouter()(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 2)
    controller = BiasUpdate(1e-3)
    traced = torch.compile(controller.observe, fullgraph=True, backend="eager")
    assert torch.equal(traced(routing, ANY), controller.observe(routing, ANY))


def test_it_balances_a_skewed_router():
    """Overload falls, step by step, to near even."""
    g = torch.Generator().manual_seed(0)
    router = BiasedRouter()
    controller = bound(router, 0.01)
    skew_E = torch.tensor([1.5, 0.5, 0.0, -1.0])
    loads = []
    for _ in range(150):
        routing = router(torch.randn(512, 4, generator=g) + skew_E, 1)
        observed = controller.observe(routing, ANY)
        loads.append(observed.max().item() / 128)
        controller.step(observed)
    assert loads[0] > 2 and max(loads[-20:]) < 1.35


def test_a_bf16_buffer_does_not_freeze_the_bias():
    assert torch.tensor(0.5, dtype=torch.bfloat16) + 1e-3 == 0.5  # the trap
    router = BiasedRouter(2, torch.bfloat16)
    router.e_score_correction_bias.fill_(0.5)
    controller = bound(router)
    want_E = torch.full((2,), 0.5)
    for _ in range(50):
        controller.step(counts(1, 3))
        want_E += torch.tensor([1e-3, -1e-3])
    assert router.e_score_correction_bias.dtype == torch.bfloat16
    bias_E = controller.state_dict()["bias"]
    assert torch.equal(bias_E, want_E)  # near 0.55 and 0.45
    assert torch.equal(router.e_score_correction_bias, bias_E.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outside_write_is_followed(dtype):
    router = BiasedRouter(2, dtype)
    controller = bound(router)
    for _ in range(3):
        controller.step(counts(1, 3))
    router.e_score_correction_bias[0] = 2.0  # a checkpoint differs in one value
    controller.step(counts(1, 3))
    bias = controller.state_dict()["bias"]
    torch.testing.assert_close(bias, torch.tensor([2.001, -0.004]))
    assert torch.equal(router.e_score_correction_bias, bias.to(dtype))


def test_a_buffer_put_in_its_place_is_found():
    router = BiasedRouter()
    controller = bound(router)
    controller.step(counts(0, 1, 1, 1))
    router.to(torch.float64)  # another tensor, another dtype
    controller.step(counts(0, 1, 1, 1))
    want = torch.tensor([2e-3, -2e-3, -2e-3, -2e-3])
    torch.testing.assert_close(router.e_score_correction_bias.float(), want)


def test_the_rate_may_follow_a_schedule_and_resumes_in_it():
    def rate(step: int) -> float:
        return 1.0 if step < 2 else 0.0

    router = BiasedRouter(2)
    controller = bound(router, rate)
    for _ in range(3):
        controller.step(counts(0, 1))
    assert router.e_score_correction_bias.tolist() == [2.0, -2.0]
    resumed_router = BiasedRouter(2)
    resumed = bound(resumed_router, rate)
    resumed.load_state_dict(controller.state_dict())
    resumed.step(counts(0, 1))
    assert resumed_router.e_score_correction_bias.tolist() == [2.0, -2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3, None, "1e-3"])
def test_a_schedule_that_returns_no_rate_moves_nothing(value):
    router = BiasedRouter(2)
    controller = bound(router, lambda step: (1.0, value)[step])
    controller.step(counts(0, 1))
    with pytest.raises(RouterConfigError, match=r"BiasUpdate: rate\(1\)=.*finite number >= 0"):
        controller.step(counts(0, 1))
    assert router.e_score_correction_bias.tolist() == [1.0, -1.0]
    assert controller.state_dict()["steps"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_first", [True, False])
def test_resume_is_exact_in_either_order_of_loading(dtype, model_first):
    g = torch.Generator().manual_seed(0)
    observed = [torch.randint(0, 9, (4,), generator=g) for _ in range(12)]
    router = BiasedRouter(4, dtype)
    controller = bound(router)
    for step in observed[:7]:
        controller.step(step)
    saved_model, saved = copy.deepcopy(router.state_dict()), controller.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())

    other = BiasedRouter(4, dtype)
    resumed = bound(other)
    loads = [lambda: other.load_state_dict(saved_model), lambda: resumed.load_state_dict(saved)]
    for load in loads if model_first else reversed(loads):
        load()
    for step in observed[7:]:
        controller.step(step)
        resumed.step(step)
    assert torch.equal(other.e_score_correction_bias, router.e_score_correction_bias)
    assert torch.equal(resumed.state_dict()["bias"], controller.state_dict()["bias"])


def test_the_state_is_a_copy_and_loading_copies():
    router = BiasedRouter(2, torch.bfloat16)
    router.e_score_correction_bias.fill_(0.5)
    controller = bound(router)
    state = controller.state_dict()
    controller.step(counts(0, 1))
    assert state["bias"].tolist() == [0.5, 0.5]
    controller.load_state_dict(state)
    state["bias"].add_(1e-4)  # less than the buffer can tell from 0.5
    assert controller.state_dict()["bias"].tolist() == [0.5, 0.5]
    assert router.e_score_correction_bias.tolist() == [0.5, 0.5]


def test_a_copied_controller_leaves_the_router_behind():
    router = BiasedRouter(2)
    controller = bound(router)
    lone = copy.deepcopy(controller)
    with pytest.raises(RouterConfigError, match=r"BiasUpdate is not bound to a router"):
        lone.step(counts(0, 1))
    other = BiasedRouter(2)
    lone.bind(other)
    lone.step(counts(0, 1))
    assert other.e_score_correction_bias.any() and not router.e_score_correction_bias.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_moves_its_own_router(duplicate):
    block = Block()
    twin = duplicate(block)
    twin.controllers[0].step(counts(0, 1, 1, 1))
    assert twin.router.e_score_correction_bias.any()
    assert not block.router.e_score_correction_bias.any()


def test_errors_say_what_to_do():
    for rate in (float("nan"), float("inf"), -1e-3, "1e-3", None, True):
        with pytest.raises(RouterConfigError, match=r"BiasUpdate: rate=.*finite number >= 0"):
            BiasUpdate(rate)
    with pytest.raises(RouterConfigError, match=r"e_score_correction_bias, which Linear does not"):
        BiasUpdate(1e-3).bind(nn.Linear(2, 2))
    trained = nn.Module()
    trained.e_score_correction_bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(RouterConfigError, match=r"parameter that the optimizer moves too"):
        BiasUpdate(1e-3).bind(trained)
    for use in (
        lambda c: c.step(counts(1, 2)),
        lambda c: c.state_dict(),
        lambda c: c.load_state_dict({"bias": torch.zeros(2), "steps": torch.tensor(0)}),
    ):
        with pytest.raises(RouterConfigError, match=r"not bound to a router"):
            use(BiasUpdate(1e-3))
    columns = ExpertChoice(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 2)
    with pytest.raises(UnsupportedRoutingError, match=r"this ExpertChoice is balanced"):
        BiasUpdate(1e-3).observe(columns, ANY)

    router = BiasedRouter(2)
    controller = bound(router)
    with pytest.raises(MoeShapeError, match=r"counts \(3,\), the bias is \(2,\)"):
        controller.step(counts(1, 2, 3))
    with pytest.raises(MissingTensorError, match=r"the state lacks bias"):
        controller.load_state_dict({"steps": torch.tensor(0)})
    with pytest.raises(UnexpectedTensorError, match=r"the state has rate"):
        controller.load_state_dict({**controller.state_dict(), "rate": 1})
    with pytest.raises(MoeShapeError, match=r"state's bias is \(3,\), the router's \(2,\)"):
        controller.load_state_dict({"bias": torch.zeros(3), "steps": torch.tensor(0)})
    assert not router.e_score_correction_bias.any()
