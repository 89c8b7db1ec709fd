"""Every router on every backend, in every dtype, under every dispatcher: right, or refused.

A cell is judged by the pass rule: its output and every gradient are as close to the fp64 truth, at
the same rounded inputs and the same choices, as the plain loop in the same dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moetk.routers.noisy_top_k
import moetk.routers.switch
from moetk import ExpertBank, MoELayer, RouterContext, record, replace_moe, replay
from moetk.dispatch import Capacity, Dispatcher, Local, by_weight
from moetk.equivalence.judge import judge, judge_together
from moetk.errors import BackendError, MoetkError, UnsupportedRoutingError
from moetk.experts import backends
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    ExpertChoiceRouter,
    GptOssRouter,
    LinearRouter,
    MixtralRouter,
    NoisyTopKRouter,
    SoftMoERouter,
    SwitchRouter,
    jitter,
    normal_like,
)
from moetk.routing import ExpertChoice, Routing, TokenChoice
from tests.tiny import VOCAB, ids, tiny

H, E, K, I, BATCH, LENGTH = 16, 4, 2, 8, 2, 6

Build = Callable[[int, int, int], nn.Module]
ROUTERS: dict[str, Build] = {
    "mixtral": MixtralRouter,
    "olmoe": lambda h, e, k: MixtralRouter(h, e, k, renormalise=False),
    "loss_free": lambda h, e, k: MixtralRouter(h, e, k, choice_bias=True),
    "every_expert": lambda h, e, k: MixtralRouter(h, e, e),
    "deepseek_v3": lambda h, e, k: DeepSeekV3Router(h, e, k, groups=2, top_groups=1, scale=2.5),
    "deepseek_v4": lambda h, e, k: DeepSeekV4Router(h, e, k, scale=1.5),
    "v4_hash": lambda h, e, k: DeepSeekV4HashRouter(h, e, k, vocab_size=VOCAB),
    "gpt_oss": GptOssRouter,
    "granite": lambda h, e, k: GptOssRouter(h, e, k, bias=False, score_dtype=torch.float32),
    "switch": lambda h, e, k: SwitchRouter(h, e, jitter=0.1),
    "noisy": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "soft": lambda h, e, k: SoftMoERouter(h, e),
}
DISPATCHERS: dict[str, Callable[[], Dispatcher]] = {
    "local": Local,
    "first_come": lambda: Local(Capacity(1.0)),
    "by_weight": lambda: Local(Capacity(1.0, by_weight)),
}
BACKENDS = ("auto", *(one.name for one in backends() if "cpu" in one.device_types))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What is not supported, and what it raises: a router under a dispatcher, or before stock experts.
REFUSED: dict[tuple[str, str], type[MoetkError]] = {
    (router, other): UnsupportedRoutingError
    for router in ("expert_choice", "soft")
    for other in ("first_come", "by_weight", "stock")
}


@pytest.fixture(autouse=True)
def one_noise_for_all_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.randn draws other numbers in float64 than in float32: the truth hears the same."""

    def normal(t: Tensor, ctx: RouterContext, draw: int = 0) -> Tensor:
        return normal_like(t.float(), ctx, draw).to(t.dtype)

    def uniform(x_TH: Tensor, eps: float, ctx: RouterContext, draw: int = 0) -> Tensor:
        noise_TH = jitter(torch.ones_like(x_TH, dtype=torch.float32), eps, ctx, draw)
        return x_TH * noise_TH

    monkeypatch.setattr(moetk.routers.noisy_top_k, "normal_like", normal)
    monkeypatch.setattr(moetk.routers.switch, "jitter", uniform)


class AsChosen(nn.Module):
    """The router in float64 throughout, weighing what `chosen` names."""

    def __init__(self, router: nn.Module, chosen: Routing) -> None:
        super().__init__()
        self.router, self.chosen = copy.deepcopy(router).double(), chosen
        self.duplicates = getattr(router, "duplicates", False)
        if isinstance(router, LinearRouter):
            self.router.gemm_dtype = self.router.score_dtype = torch.float64

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> Routing:
        if isinstance(self.chosen, TokenChoice):
            return self.router(x_TH, replace(ctx, replay=self.chosen.experts_TK))
        routing = self.router(x_TH, ctx)
        if isinstance(self.chosen, ExpertChoice):
            tokens_EC = self.chosen.tokens_EC
            weights_EC = routing.scores_TE.T.gather(1, tokens_EC.clamp(min=0))
            weights_EC = weights_EC.masked_fill(tokens_EC < 0, 0)
            return replace(routing, tokens_EC=tokens_EC, weights_EC=weights_EC)
        return routing


def as_kept(chosen: Routing) -> Local:
    """A dispatcher that drops what was dropped in `chosen`."""

    def drop(routing: Routing, ctx: RouterContext) -> TokenChoice:
        assert isinstance(routing, TokenChoice) and isinstance(chosen, TokenChoice)
        assert chosen.kept_TK is not None
        weights_TK = routing.weights_TK.masked_fill(~chosen.kept_TK, 0)
        return replace(routing, kept_TK=chosen.kept_TK, weights_TK=weights_TK)

    dropped = isinstance(chosen, TokenChoice) and chosen.kept_TK is not None
    return Local(drop if dropped else None)


def layer_of(router: str, dispatcher: str, dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    parts = ROUTERS[router](H, E, K), ExpertBank(H, E, I, backend="reference")
    layer = MoELayer(*parts, dispatcher=DISPATCHERS[dispatcher]())
    for tensor in (*parts[0].parameters(), *parts[0].buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.4)
    return layer.to(dtype)


def step(layer: MoELayer, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Routing]:
    """The output and every gradient, by the names of the router's and the bank's parameters."""
    dtype = next(layer.experts.parameters()).dtype
    x = batch["x"].to(dtype).requires_grad_()
    ctx = RouterContext(token_ids=batch["ids"], batch_shape=(BATCH, LENGTH), seed=5)
    y, routing = layer(x, ctx)
    leaves = {"x": x}
    leaves |= {n.replace("router.router", "router"): p for n, p in layer.named_parameters()}
    found = torch.autograd.grad(
        y, list(leaves.values()), batch["g"].to(dtype), materialize_grads=True
    )
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}, routing


def batches(dtype: torch.dtype, count: int = 4) -> Iterator[dict[str, Tensor]]:
    """Several, so that the error of a gradient of a few numbers is no single draw."""
    for seed in range(count):
        source = torch.Generator().manual_seed(seed)
        x, g = (torch.randn(BATCH, LENGTH, H, generator=source).to(dtype) for _ in range(2))
        yield {"x": x, "g": g, "ids": torch.randint(VOCAB, (BATCH * LENGTH,), generator=source)}


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("router", ROUTERS)
def test_layers(router: str, dtype: torch.dtype, dispatcher: str) -> None:
    eager = layer_of(router, dispatcher, dtype)
    if (router, dispatcher) in REFUSED:
        for batch in batches(dtype, 1):
            with pytest.raises(REFUSED[router, dispatcher], match="Use Local\\(\\) without one"):
                step(eager, batch)
        return
    verdicts: dict[tuple[str, str], list[Any]] = {}
    for batch in batches(dtype):
        plain, chosen = step(eager, batch)
        truth_of = copy.deepcopy(eager).double()
        truth_of.router = AsChosen(eager.router, chosen)
        truth_of.dispatcher = as_kept(chosen)
        truth, _ = step(truth_of, batch)
        for backend in BACKENDS:
            eager.experts.backend = backend
            ours, again = step(eager, batch)
            eager.experts.backend = "reference"
            assert type(again) is type(chosen) and ours.keys() == truth.keys()
            for name, tensor in truth.items():
                assert ours[name].dtype == dtype and ours[name].isfinite().all()
                verdict = judge(name, ours[name], plain[name], tensor, reduction=H * I * E)
                verdicts.setdefault((backend, name), []).append(verdict)
    for (backend, name), of_batches in verdicts.items():
        (mean,) = judge_together(of_batches)
        assert mean.ok, (backend, name, mean)


def model_of(router: str, backend: str, dtype: torch.dtype) -> nn.Module:
    """One layer of Qwen3-MoE with another router; its stock experts run as their eager loop, the
    one implementation that takes float64."""
    model = tiny("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("eager")

    def build(spec: Any) -> nn.Module:
        torch.manual_seed(0)
        made = ROUTERS[router](spec.hidden_size, spec.num_experts, spec.top_k)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.4)
        return made

    replace_moe(model, build, backend=backend)
    return model.train().to(dtype)


def train(model: nn.Module) -> dict[str, Tensor]:
    """The logits, and each gradient of the layer's experts and router."""
    tokens = ids()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if ".mlp." in n and p.grad is not None}
    return {"logits": out.logits.detach(), **named}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("router", ROUTERS)
def test_stock_experts_of_a_model(router: str, dtype: torch.dtype) -> None:
    if (router, "stock") in REFUSED:
        with pytest.raises(REFUSED[router, "stock"], match="runs on moetk's banks only"):
            train(model_of(router, "stock", dtype))
        assert train(model_of(router, "auto", dtype)).keys() > {"logits"}
        return
    plain = model_of(router, "reference", dtype)
    with record(plain) as recorded:
        eager = train(plain)
    ours = train(model_of(router, "stock", dtype))
    truth_of = model_of(router, "reference", dtype).double()
    with replay(truth_of, recorded, weights="recompute"):
        truth = train(truth_of)
    assert ours.keys() == truth.keys() and len(ours) >= 3
    for name, tensor in truth.items():
        assert ours[name].dtype == dtype
        verdict = judge(name, ours[name], eager[name], tensor, reduction=24 * 32 * 16)
        assert verdict.ok, verdict


def test_stock_experts_take_no_dispatcher() -> None:
    with pytest.raises(BackendError, match="dispatcher=None"):
        replace_moe(tiny("qwen3_moe"), backend="stock", dispatcher=Local(Capacity(1.0)))


def test_the_grid_has_every_router_of_the_package() -> None:
    offered = {
        one
        for one in vars(moetk.routers).values()
        if isinstance(one, type) and one.__name__.endswith("Router") and one is not LinearRouter
    }
    assert {type(build(H, E, K)) for build in ROUTERS.values()} == offered
