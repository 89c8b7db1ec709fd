"""Layers, routers and banks of moetk as sides, against written-out twins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moetk import ExpertBank, MoELayer, RouterContext, TokenChoice, routers
from moetk.controllers import BiasUpdate
from moetk.dispatch import Capacity, Local
from moetk.equivalence.judge import relative_error
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.trace import Trace, cotangent, observe
from moetk.errors import EquivalenceError, MoeShapeError
from moetk.experts import BankSpec, ClampedGated, Gated, GptOssGated, Plain
from moetk.losses import LoadBalancingLoss, RouterZLoss
from moetk.routers import gather, top_k

E, H, I = 6, 8, 5
INNER = ("up", "activation", "expert_output")
ACTIVATIONS = (Gated(), ClampedGated(0.5), GptOssGated(limit=0.7), Plain())


def written_out(
    bank: ExpertBank, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> dict[str, Tensor]:
    """A bank, choice by choice. ids_TK -1 = not computed. Leaves are the bank's own parameters."""
    spec, weights = bank.spec, bank.weights()
    up_EHJ, down_EIH = weights.as_columns(spec)
    unused, ids = (ids_TK < 0)[..., None], ids_TK.clamp(min=0)
    x_TKH = x_TH[:, None].expand(*ids.shape, -1)
    if spec.scale == "input":
        x_TKH = x_TKH * weights_TK[..., None]
    up = _together(spec, torch.einsum("tkh,tkhj->tkj", x_TKH, up_EHJ[ids])).masked_fill(unused, 0)
    hidden = up
    if weights.up_bias is not None:
        hidden = hidden + _together(spec, weights.up_bias)[ids]
    halves = hidden.chunk(2, -1) if spec.gated else (hidden,)
    activation = spec.activation(*halves).masked_fill(unused, 0)
    output = torch.einsum("tki,tkih->tkh", activation, down_EIH[ids])
    if weights.down_bias is not None:
        output = output + weights.down_bias[ids]
    output = output.masked_fill(unused, 0)
    share = output if spec.scale == "input" else output * weights_TK[..., None]
    return {"up": up, "activation": activation, "expert_output": output, "combined": share.sum(1)}


def _together(spec: BankSpec, x: Tensor) -> Tensor:
    """All gate columns before all up columns."""
    alternate = spec.gated and spec.interleaved
    return torch.cat([x[..., ::2], x[..., 1::2]], -1) if alternate else x


@st.composite
def cases(draw: st.DrawFn) -> tuple[ExpertBank, Tensor, TokenChoice]:
    """A bank in some layout and a routing with unused, dropped, repeated and starved choices."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    spec = BankSpec(
        E, H, I,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        transposed=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        scale=draw(st.sampled_from(["output", "output", "input"])),
    )  # fmt: skip
    backend = draw(st.sampled_from(["auto", "reference"]))
    bank = ExpertBank(H, E, I, spec=spec, bias=draw(st.booleans()), backend=backend).double()
    tokens, k = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    hottest = draw(st.sampled_from([1, 3, E]))
    x_TH = torch.randn(tokens, H, generator=generator, dtype=torch.float64)
    if tokens > 2 and draw(st.booleans()):
        x_TH[1] = x_TH[0]  # two tokens that no value can tell apart
    ids_TK = torch.randint(-1, hottest, (tokens, k), generator=generator)
    kept_TK = torch.rand(tokens, k, generator=generator) > 0.2
    weights_TK = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    weights_TK = weights_TK.masked_fill((ids_TK < 0) | ~kept_TK, 0)
    return bank, x_TH, TokenChoice(ids_TK, weights_TK, E, kept_TK=kept_TK)


@settings(max_examples=40)
@drawn(cases())
def test_a_bank_is_seen_through(case: tuple[ExpertBank, Tensor, TokenChoice]) -> None:
    bank, x_TH, routing = case
    trace = observe(side_of(bank, x_TH, routing=routing), x_TH, seed=1)
    computed_TK = routing.experts_TK.masked_fill(~routing.kept_TK, -1)
    assert torch.equal(trace.values["dispatched"], computed_TK >= 0)
    x_TH = x_TH.clone().requires_grad_()
    weights_TK = routing.weights_TK.clone().requires_grad_()
    want = written_out(bank, x_TH, computed_TK, weights_TK)
    shown = set(INNER) - ({"expert_output"} if bank.spec.scale == "input" else set())
    assert shown <= set(trace.values)
    assert ("expert_output" in trace.values) == ("expert_output" in shown)
    for name in (*shown, "combined"):
        assert relative_error(trace.values[name], want[name]) < 1e-12, name
    if not len(x_TH):
        return
    root = want["combined"]
    targets = {"x": x_TH, "weights": weights_TK, **{n: want[n] for n in ("up", "activation")}}
    grads = torch.autograd.grad(
        root, [*targets.values()], cotangent(root, 1), allow_unused=True, retain_graph=True
    )
    for (name, target), gradient in zip(targets.items(), grads, strict=True):
        gradient = torch.zeros_like(target) if gradient is None else gradient
        if bool((computed_TK >= 0).any()):  # else there is no graph through the experts
            assert relative_error(trace.grads[name], gradient) < 1e-12, name


def layer(**parts: Any) -> MoELayer:
    torch.manual_seed(0)
    router = parts.pop("router", None) or routers.DeepSeekV3Router(H, E, 2, groups=3, top_groups=2)
    return MoELayer(router, ExpertBank(H, E, I), **parts)


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 9, H)), generator=torch.Generator().manual_seed(5))


def seen(part: Any, x: Tensor, **given: Tensor) -> Trace:
    return observe(side_of(part, x), x.flatten(0, -2), given=given)


def test_a_layer_shows_every_stage_of_its_own_forward() -> None:
    part = layer(shared_experts=nn.Linear(H, H))
    x = batch()
    trace = seen(part, x)
    y, routing = part.eval()(x)
    want = {
        "logits": routing.logits_TE, "scores": routing.scores_TE, "choice": routing.choice_TE,
        "indices": routing.experts_TK, "weights": routing.weights_TK, "output": y.flatten(0, 1),
        "counts": routing.experts_TK.flatten().bincount(minlength=E),
        "dispatched": routing.experts_TK >= 0,
        "combined": (y - part.shared_experts(x)).flatten(0, 1),
        **written_out(part.experts, x.flatten(0, 1), routing.experts_TK, routing.weights_TK),
    }  # fmt: skip
    assert set(trace.values) == set(want)
    for name, value in want.items():
        assert torch.allclose(trace.values[name].double(), value.double(), atol=1e-6), name
    x_TH = x.flatten(0, 1).requires_grad_()
    y = part(x_TH)[0]
    parameters = dict(part.named_parameters())
    grads = torch.autograd.grad(y, [x_TH, *parameters.values()], cotangent(y, 0))
    common = {"router.weight": "router.weight", "experts.gate_up_proj": "up_weight",
              "experts.down_proj": "down_weight"}  # fmt: skip
    for name, gradient in zip(["x", *parameters], grads, strict=True):
        assert torch.allclose(trace.grads[common.get(name, name)], gradient, atol=1e-5), name


def test_a_layer_takes_given_choices_and_weights() -> None:
    part, x = layer(), batch()
    own = seen(part, x)
    ids = (own.values["indices"] + 1) % E
    trace = seen(part, x, indices=ids)
    assert torch.equal(trace.values["indices"], own.values["indices"])
    assert torch.equal(trace.values["counts"], ids.flatten().bincount(minlength=E))
    chosen = gather(own.values["scores"], ids)
    assert torch.allclose(trace.values["weights"], chosen / chosen.sum(-1, keepdim=True))
    weights = torch.rand(ids.shape)
    forced = seen(part, x, indices=ids, weights=weights)
    assert torch.equal(forced.values["weights"], trace.values["weights"])
    want = written_out(part.experts, x.flatten(0, 1), ids, weights)
    assert torch.allclose(forced.values["combined"], want["combined"], atol=1e-6)
    assert forced.grads["weights"].shape == weights.shape


def test_a_router_that_ignores_the_given_choice_is_named() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = routers.MixtralRouter(H, E, 2)

        def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
            return self.inner(x_TH, RouterContext())

    ids = torch.zeros(18, 2, dtype=torch.int64)
    for part in (Deaf(), layer(router=Deaf())):
        with pytest.raises(EquivalenceError, match="cannot take given indices: .*Deaf did not"):
            seen(part, batch(), indices=ids)


def test_what_capacity_drops_is_not_dispatched() -> None:
    by_layer = layer(dispatcher=Local(Capacity(0.5)))
    by_router = layer(router=routers.SwitchRouter(H, E, 1, capacity_factor=0.5))
    x = batch()
    for part in (by_layer, by_router):
        trace = seen(part, x)
        kept = part.eval()(x)[1].kept_TK
        assert not kept.all() and torch.equal(trace.values["dispatched"], kept)
        assert trace.values["counts"].sum() == kept.numel()
        for name in INNER:
            assert not trace.values[name][~kept].any() and trace.values[name][kept].any()
        assert side_of(part, x).facts["capacity"] == Capacity(0.5)
        forced = seen(part, x, weights=torch.ones(kept.shape))
        assert torch.equal(forced.values["dispatched"], kept)


def test_losses_read_the_routers_own_routing() -> None:
    losses = [LoadBalancingLoss(0.1), RouterZLoss(0.01)]
    part, x = layer(losses=losses), batch()
    trace = seen(part, x)
    routing = part(x)[1]
    want = torch.stack([loss(routing, RouterContext(batch_shape=(2, 9))) for loss in losses])
    assert torch.allclose(trace.values["losses"], want)
    assert trace.grads["losses"].shape == trace.values["logits"].shape


def test_counts_are_what_the_controller_was_given() -> None:
    class Doubled(BiasUpdate):
        def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
            return 2 * super().observe(routing, ctx)

    x = batch()
    plain, doubled = (layer(controllers=[c]) for c in (BiasUpdate(0.1), Doubled(0.1)))
    once = seen(plain, x).values["counts"]
    assert torch.equal(once, seen(plain, x).values["indices"].flatten().bincount(minlength=E))
    assert torch.equal(seen(doubled, x).values["counts"], 2 * once)
    assert not any(total.any() for one in doubled.attachment.steered for total in one.totals)


class Counting(routers.MixtralRouter):
    """Counts in forward, in a plain attribute: twice, where activations are recomputed."""

    def __init__(self, replaces: bool = False) -> None:
        super().__init__(H, E, 2)
        self.load_of_each = torch.full((E,), 3.0)
        self.replaces = replaces

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        routing = super().forward(x_TH, ctx)
        counts = routing.experts_TK.flatten().bincount(minlength=E).float()
        self.load_of_each = counts if self.replaces else self.load_of_each + counts
        return routing


def test_counts_are_what_a_counter_gains_under_recompute() -> None:
    x = batch()
    for times, router in ((2, Counting()), (1, Counting(replaces=True))):
        for part in (router, layer(router=router)):
            before = router.load_of_each
            trace = seen(part, x)
            once = trace.values["indices"].flatten().bincount(minlength=E)
            assert torch.equal(trace.values["counts"], times * once)
            assert router.load_of_each is before


def test_experts_that_choose_show_what_can_be_shown() -> None:
    part, x = layer(router=routers.ExpertChoiceRouter(H, E, 2)), batch()
    trace = seen(part, x)
    assert set(trace.values) == {"logits", "scores", "combined"}
    assert torch.allclose(trace.values["combined"], part.eval()(x)[0].flatten(0, 1))
    with pytest.raises(EquivalenceError, match="MoELayer cannot take given indices"):
        seen(part, x, indices=torch.zeros(18, 2, dtype=torch.int64))
    with pytest.raises(EquivalenceError, match=r"a ExpertChoice, which has no weight"):
        seen(part, x, weights=torch.ones(18, 2))


def test_no_token_at_all() -> None:
    x = batch(0, H)
    trace = seen(layer(), x)
    assert trace.values["up"].shape == (0, 2, 2 * I) and trace.values["combined"].shape == (0, H)
    assert not trace.values["counts"].any()


def test_a_row_of_nan_stays_in_its_row() -> None:
    x = batch()
    x[0, 3] = torch.nan
    part = layer(router=routers.MixtralRouter(H, E, 2))
    part.check = False
    trace = seen(part, x)
    for name in (*INNER, "combined"):
        bad = trace.values[name].flatten(1).isnan().any(-1)
        assert bad.nonzero().flatten().tolist() == [3], name


def test_eager_and_double_are_copies_of_the_same_function() -> None:
    part, x = layer(), batch()
    side, x_TH = side_of(part, x), batch().flatten(0, 1)
    assert side.eager().module.experts.backend == "reference" and part.experts.backend == "auto"
    exact = observe(side.in_double(), x_TH.double())
    assert exact.values["combined"].dtype == torch.float64
    assert next(part.parameters()).dtype == torch.float32
    for one in (side.eager(), side.in_double()):
        trace = observe(one, x_TH.to(one.module.experts.down_proj.dtype))
        assert relative_error(trace.values["combined"], exact.values["combined"]) < 1e-6


def test_a_function_as_a_router() -> None:
    weight = torch.randn(E, H, generator=torch.Generator().manual_seed(2))

    def mine(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores = (x_TH @ weight.T).softmax(-1)
        ids = top_k(scores, 2, ctx)
        return TokenChoice(ids, gather(scores, ids), E, scores_TE=scores)

    x = batch()
    for part in (mine, layer(router=mine)):
        side = side_of(part, x)
        trace = observe(side, x.flatten(0, 1))
        assert {"scores", "indices", "weights", "counts"} <= set(trace.values)
        with pytest.raises(EquivalenceError, match="its router is a function.*an nn.Module"):
            side.in_double()
    assert side_of(mine, x).name.endswith("mine")


def test_a_router_alone_ends_in_its_weights() -> None:
    part, x = routers.MixtralRouter(H, E, 2), batch()
    trace = seen(part, x)
    assert set(trace.values) == {
        "logits", "scores", "choice", "indices", "weights", "counts", "dispatched",
    }  # fmt: skip
    assert {"logits", "scores", "router.weight", "x"} <= set(trace.grads)
    with pytest.raises(EquivalenceError, match="id 6: it has 6 experts"):
        seen(part, x, indices=torch.full((18, 2), E))
    with pytest.raises(EquivalenceError, match=r"indices \(4, 2\): it has T=18 tokens"):
        seen(part, x, indices=torch.zeros(4, 2, dtype=torch.int64))


def test_a_bank_needs_to_be_told_what_to_compute() -> None:
    bank, x = ExpertBank(H, E, I), batch()
    with pytest.raises(EquivalenceError, match="a bank without a router: pass routing=TokenChoice"):
        seen(bank, x)
    choice = routers.ExpertChoiceRouter(H, E, 2)(x.flatten(0, 1), RouterContext())
    with pytest.raises(EquivalenceError, match="routing= is a ExpertChoice"):
        observe(side_of(bank, x, routing=choice), x.flatten(0, 1))


def test_what_is_no_part_at_all() -> None:
    with pytest.raises(EquivalenceError, match="int cannot be compared. Pass a moetk.MoELayer"):
        side_of(3, batch())


def test_nothing_of_the_layer_changes() -> None:
    part, x = layer(controllers=[BiasUpdate(0.1)], losses=[RouterZLoss(0.1)]), batch()
    part.router.eval()
    before = copy.deepcopy(part.state_dict())
    attributes = {name: dict(vars(one)) for name, one in part.named_modules()}
    side = side_of(part, x)
    observe(side, x.flatten(0, 1))
    with pytest.raises(MoeShapeError):
        observe(side, x.flatten(0, 1)[:, 1:])
    assert part.training and not part.router.training
    assert {name: dict(vars(one)) for name, one in part.named_modules()} == attributes
    assert all(torch.equal(part.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in part.parameters())
