"""A layer from parts: what it computes, what it hands to its parts, what it refuses."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moetk import ExpertBank, MoELayer, RouterContext, TokenChoice
from moetk.dispatch import Capacity, Local, dropped
from moetk.equivalence.judge import relative_error
from moetk.errors import (
    DuplicateExpertError,
    MissingContextError,
    MoeShapeError,
    ReplayError,
    UnsupportedRoutingError,
)
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    ExpertChoiceRouter,
    GptOssRouter,
    MixtralRouter,
    SoftMoERouter,
    SwitchRouter,
)
from moetk.routing import Routing

H, E, K = 16, 4, 2
ROUTERS: dict[str, Any] = {
    "mixtral": lambda: MixtralRouter(H, E, K),
    "deepseek_v3": lambda: DeepSeekV3Router(H, E, K, groups=2, top_groups=1),
    "gpt_oss": lambda: GptOssRouter(H, E, K),
    "switch": lambda: SwitchRouter(H, E, jitter=0),
    "expert_choice": lambda: ExpertChoiceRouter(H, E, K),
    "soft": lambda: SoftMoERouter(H, E),
}


def layer_of(router: Any, **parts: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(router(), ExpertBank(H, E, 8), **parts).double()


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@given(st.integers(0, 2**16), st.integers(0, 3), st.integers(1, 6), st.booleans())
@settings(max_examples=12)
def test_is_router_then_bank(router: Any, seed: int, batch: int, length: int, shared: bool) -> None:
    layer = layer_of(router, shared_experts=nn.Linear(H, H) if shared else None)
    torch.manual_seed(seed)
    x_BSH = torch.randn(batch, length, H, dtype=torch.float64)
    y_BSH, routing = layer(x_BSH)
    x_TH = x_BSH.flatten(0, 1)
    again = layer.router(x_TH, RouterContext(batch_shape=(batch, length)))
    assert type(routing) is type(again)
    want_TH = layer.experts(x_TH, again)
    if layer.shared_experts is not None:
        want_TH = want_TH + layer.shared_experts(x_TH)
    assert y_BSH.shape == x_BSH.shape and torch.equal(y_BSH.flatten(0, 1), want_TH)


@pytest.mark.parametrize("shape", [(H,), (5, H), (2, 3, H), (2, 3, 4, H)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = layer_of(ROUTERS["mixtral"])
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 1:
        x = x[None]
    y, routing = layer(x)
    assert y.shape == x.shape
    assert routing.experts_TK.shape == (x.numel() // H, K)
    flat, _ = layer(x.reshape(-1, H))
    assert torch.equal(y.reshape(-1, H), flat)


def test_every_parameter_learns() -> None:
    layer = layer_of(ROUTERS["mixtral"], shared_experts=nn.Linear(H, H))
    x = torch.randn(4, 8, H, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert x.grad is not None and x.grad.isfinite().all()


def test_gradcheck() -> None:
    """Float64 throughout, so that finite differences agree; scores wide apart, so that no
    difference crosses a border."""
    layer = layer_of(lambda: MixtralRouter(H, E, K, score_dtype=None))
    x = torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    scores, _ = layer.router(x, RouterContext()).scores_TE.sort(-1)
    assert float((scores[:, 1:] - scores[:, :-1]).min()) > 1e-4
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


def test_the_context_is_passed_on() -> None:
    seen: list[RouterContext] = []

    def router(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        seen.append(ctx)
        experts_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64)
        return TokenChoice(experts_TK, x_TH.new_ones(experts_TK.shape), E)

    layer = MoELayer(router, ExpertBank(H, E, 8))
    layer(torch.randn(2, 3, H))
    layer(torch.randn(6, H))
    mine = RouterContext(seed=3)
    layer(torch.randn(6, H), mine)
    assert [ctx.batch_shape for ctx in seen] == [(2, 3), None, None]
    assert seen[2] is mine
    assert not [name for name, _ in layer.named_parameters() if "router" in name]


def test_a_hash_router_gets_its_ids_from_the_caller() -> None:
    layer = MoELayer(DeepSeekV4HashRouter(H, E, K, vocab_size=32), ExpertBank(H, E, 8))
    x_TH = torch.randn(6, H)
    _, routing = layer(x_TH, RouterContext(token_ids=torch.arange(6)))
    assert torch.equal(routing.experts_TK, layer.router.tid2eid[:6])
    with pytest.raises(MissingContextError, match="DeepSeekV4HashRouter needs ctx.token_ids"):
        layer(x_TH)


def test_noise_needs_a_seed() -> None:
    layer = MoELayer(SwitchRouter(H, E, jitter=0.1), ExpertBank(H, E, 8))
    x_TH = torch.randn(6, H)
    with pytest.raises(MissingContextError, match=r"Call it with RouterContext\(seed=...\)"):
        layer(x_TH)
    first, again = (layer(x_TH, RouterContext(seed=1))[0] for _ in range(2))
    assert torch.equal(first, again)
    layer.eval()(x_TH)


def test_capacity_drops_and_the_routing_says_what_was_wanted() -> None:
    layer = layer_of(ROUTERS["mixtral"], dispatcher=Local(Capacity(0.5)))
    x = torch.randn(2, 8, H, dtype=torch.float64)
    y, routing = layer(x)
    free, wanted = layer_of(ROUTERS["mixtral"])(x)
    assert torch.equal(routing.experts_TK, wanted.experts_TK)
    assert wanted.kept_TK is None and not routing.kept_TK.all()
    assert dropped(routing) == (~routing.kept_TK).sum()
    assert torch.equal(routing.weights_TK == 0, ~routing.kept_TK)
    assert relative_error(y, free) > 1e-3
    with pytest.raises(UnsupportedRoutingError, match="ExpertChoice"):
        layer_of(ROUTERS["expert_choice"], dispatcher=Local(Capacity(0.5)))(x)


def test_replay_reaches_the_router() -> None:
    layer = layer_of(ROUTERS["mixtral"])
    x_TH = torch.randn(6, H, dtype=torch.float64)
    replay = torch.tensor([[3, 0]]).expand(6, 2)
    _, routing = layer(x_TH, RouterContext(replay=replay))
    assert torch.equal(routing.experts_TK, replay)


class Stubborn(nn.Module):
    def forward(self, x_TH: Tensor, ctx: RouterContext) -> Routing:
        experts_TK = torch.arange(K).expand(len(x_TH), K)
        return TokenChoice(experts_TK, x_TH.new_ones(experts_TK.shape), E)


def test_a_router_that_ignores_a_replay() -> None:
    layer = MoELayer(Stubborn(), ExpertBank(H, E, 8))
    x_TH = torch.randn(6, H)
    layer(x_TH, RouterContext(replay=torch.arange(K).expand(6, K)))
    with pytest.raises(ReplayError, match="Stubborn did not take the replayed choice"):
        layer(x_TH, RouterContext(replay=torch.tensor([[3, 0]]).expand(6, 2)))


def returning(**changes: Any) -> Any:
    def router(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        experts_TK = torch.arange(K).expand(len(x_TH), K)
        values = {"experts_TK": experts_TK, "weights_TK": torch.ones(len(x_TH), K), **changes}
        return TokenChoice(**{"num_experts": E, **values})

    return router


def test_what_a_router_returns_is_checked() -> None:
    x_TH = torch.randn(6, H)
    bank = ExpertBank(H, E, 8)
    message = "returning.<locals>.router: num_experts=5 in the routing, but the bank has 4 experts."
    with pytest.raises(MoeShapeError, match=re.escape(message)):
        MoELayer(returning(num_experts=5), bank)(x_TH)
    same = torch.zeros(6, K, dtype=torch.int64)
    with pytest.raises(DuplicateExpertError, match="token 0 names an expert twice"):
        MoELayer(returning(experts_TK=same), bank)(x_TH)
    MoELayer(returning(experts_TK=same), bank, check=False)(x_TH)  # shapes only
    declared = returning(experts_TK=same)
    declared.duplicates = True
    MoELayer(declared, bank)(x_TH)


def test_copies_and_pickles() -> None:
    layer = layer_of(ROUTERS["deepseek_v3"])
    x_TH = torch.randn(6, H, dtype=torch.float64)
    want, _ = layer(x_TH)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x_TH)[0], want)
    other = layer_of(ROUTERS["deepseek_v3"])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x_TH)[0], want)


@pytest.mark.parametrize("router", ["mixtral", "deepseek_v3"])
def test_one_graph(router: str) -> None:
    layer = layer_of(ROUTERS[router])
    x = torch.randn(2, 6, H, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    want, _ = layer(x)
    assert relative_error(y, want) < 1e-10
    found, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, want))
    assert relative_error(found, expected) < 1e-10
