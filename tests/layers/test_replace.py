"""Routers of one's own in a stock model; the way back; and what is refused."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import moetk
from moetk import MoetkError, RouterContext, TokenChoice, replace_moe
from moetk.errors import (
    AuxScaleError,
    BackendError,
    DuplicateExpertError,
    ExpertIndexError,
    ForeignExpertsError,
    MissingContextError,
    MoeDtypeError,
    MoeShapeError,
    NonFiniteRoutingError,
    ReplaceError,
    RouterConfigError,
    RoutingWeightError,
    UnsupportedModelError,
    UnsupportedRoutingError,
)
from moetk.routers import (
    ExpertChoiceRouter,
    MixtralRouter,
    NoisyTopKRouter,
    SoftMoERouter,
    SwitchRouter,
    gather,
    top_k,
)
from tests.layers.stock import assert_equal, checkpointed, gradients, replaced, step, stock
from tests.tiny import FAMILIES, E, K, ids

families = pytest.mark.parametrize("family", FAMILIES)
GATES = {"gpt_oss": "router", "granitemoe": "router"}


class CosineRouter(nn.Module):
    """The README's."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.weight, self.k = nn.Parameter(torch.randn(num_experts, hidden_size)), k

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = 10 * normalize(x_TH.float(), dim=-1) @ normalize(self.weight.float(), dim=-1).T
        experts_TK = top_k(scores_TE, self.k, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK).softmax(-1), len(self.weight))


def cosine(spec: Any) -> CosineRouter:
    torch.manual_seed(spec.layer)
    return CosineRouter(spec.hidden_size, spec.num_experts, spec.top_k)


@families
@pytest.mark.parametrize("backend", ["auto", "stock"])
def test_a_router_with_parameters(family: str, backend: str) -> None:
    """Its parameters lie under the stock gate, which stays and freezes."""
    model = stock(family)
    ours = replaced(model, cosine, backend=backend)
    names = {n for n, _ in ours.named_parameters()} - {n for n, _ in model.named_parameters()}
    gate = GATES.get(family, "gate")
    assert len(names) == 2 and all(name.endswith(f".{gate}.moetk.weight") for name in names)
    found = step(ours)
    assert names <= found.keys()
    assert all(found[name].abs().max() > 0 for name in names)
    assert not any(f".{gate}.weight" in name for name in found)
    assert ours.get_parameter(next(iter(names))).dtype == torch.float64
    for reentrant in (False, True):
        assert_equal(step(checkpointed(copy.deepcopy(ours), reentrant=reentrant)), found)


def even(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
    """A router that is a plain function: token t takes the experts t, t + 1, ..."""
    first_T1 = torch.arange(len(x_TH))[:, None]
    experts_TK = ctx.replayed((first_T1 + torch.arange(K)) % E)
    return TokenChoice(experts_TK, x_TH.new_full(experts_TK.shape, 1 / K), E)


@families
def test_a_router_that_is_a_function(family: str) -> None:
    ours = replaced(stock(family), lambda spec: even)
    with moetk.record(ours) as recording:
        found = step(ours)
    assert ours.state_dict().keys() == stock(family).state_dict().keys()
    for layer in recording:
        counts = torch.bincount(recording[layer][0].experts_TK.flatten(), minlength=E)
        assert (counts == ids().numel() * K // E).all()
    assert_equal(step(replaced(stock(family), lambda spec: even, backend="stock")), found)


@families
def test_a_factory_may_leave_a_layer(family: str) -> None:
    """None keeps that layer's own router, and where all are None nothing changes."""
    model = stock(family)
    assert_equal(step(replaced(model, lambda spec: None)), step(model))
    ours = replaced(model, lambda spec: cosine(spec) if spec.moe_index == 1 else None)
    names = [name for name in ours.state_dict() if ".moetk." in name]
    assert len(names) == 1


def test_what_a_factory_is_told() -> None:
    seen = []
    model = stock("deepseek_v3")
    replace_moe(model, lambda spec: seen.append(spec))
    assert [spec.name for spec in seen] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert [(spec.layer, spec.moe_index, spec.num_moe_layers) for spec in seen] == [
        (1, 0, 2),
        (2, 1, 2),
    ]
    for spec in seen:
        assert (spec.hidden_size, spec.num_experts, spec.top_k) == (32, E, K)
        assert spec.intermediate_size == 16 and spec.config is model.config
        assert spec.module is model.get_submodule(spec.name) and spec.gate is spec.module.gate


def test_a_router_may_start_from_the_pretrained_gate() -> None:
    model = stock("qwen3_moe", torch.float32)

    def factory(spec: Any) -> MixtralRouter:
        router = MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k, tie="stock")
        router.load_state_dict(spec.gate.state_dict())
        return router

    ours = replaced(model, factory)
    got, want = ours(input_ids=ids()).logits, replaced(model)(input_ids=ids()).logits
    assert torch.equal(got, want)


OTHER_KINDS: dict[str, Callable[[Any], nn.Module]] = {
    "ExpertChoice": lambda spec: ExpertChoiceRouter(spec.hidden_size, spec.num_experts, spec.top_k),
    "SoftChoice": lambda spec: SoftMoERouter(spec.hidden_size, spec.num_experts),
}


@families
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_routing(family: str, kind: str) -> None:
    model = stock(family)
    ours = replaced(model, OTHER_KINDS[kind])
    found = step(ours)
    assert any(".moetk." in name and found[name].abs().max() > 0 for name in found)
    assert_equal(step(checkpointed(ours, reentrant=False)), found)
    message = f"reads a TokenChoice; this router returns a {kind}, which runs on moetk's banks only"
    with pytest.raises(UnsupportedRoutingError, match=message):
        step(replaced(model, OTHER_KINDS[kind], backend="stock"))


def unused(weight: float) -> Callable[[Any], Any]:
    """Routers whose last slot is -1, with that weight."""

    def router(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        routing = even(x_TH, ctx)
        weights_TK = routing.weights_TK.clone()
        experts_TK = routing.experts_TK.clone()
        experts_TK[5, -1], weights_TK[5, -1] = -1, weight
        return TokenChoice(experts_TK, weights_TK, E)

    return lambda spec: router


@families
def test_foreign_experts_never_see_an_unused_slot(family: str) -> None:
    model = stock(family)
    ours = replaced(model, unused(0.0), backend="stock")
    assert_equal(step(ours), step(replaced(model, unused(0.0), backend="reference")))


def test_an_unused_slot_with_weight() -> None:
    model = stock("mixtral")
    with pytest.raises(RoutingWeightError, match="router in model.layers.0.mlp: experts_TK is -1"):
        step(replaced(model, unused(0.31)))
    message = (
        "MixtralExperts in model.layers.0.mlp cannot read -1: experts_TK (24, 4) has -1 at token "
        "5, column 3 with weight 0.31. An unused slot needs weight 0; mark a dropped choice in "
        "kept_TK instead."
    )
    with pytest.raises(ForeignExpertsError, match=re.escape(message)):
        step(replaced(model, unused(0.31), backend="stock", check=False))


class Chained(nn.Module):
    """Adds the previous layer's weights to its own scores, as ZAYA's routers pass state on."""

    reads_previous = True

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.hidden_size))
        self.first = spec.moe_index == 0

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.to(x_TH.dtype).T).softmax(-1)
        if not self.first:
            previous = ctx.require("previous", self)
            scores_TE = scores_TE.scatter_add(1, previous.experts_TK, previous.weights_TK)
        experts_TK = top_k(scores_TE, K, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), E)


@families
def test_the_previous_routing(family: str) -> None:
    """Read with its graph; the same under non-reentrant checkpointing; refused under reentrant."""
    torch.manual_seed(0)
    ours = replaced(stock(family), Chained)
    found = step(ours)
    first = next(name for name in found if ".moetk." in name)

    alone = copy.deepcopy(ours)
    for module in alone.modules():
        if isinstance(module, Chained):
            module.forward = cut(module)  # type: ignore[method-assign]
    assert not torch.allclose(step(alone)[first], found[first])

    assert_equal(step(checkpointed(copy.deepcopy(ours), reentrant=False)), found)
    with pytest.raises(ReplaceError, match="reads ctx.previous.* reentrant activation"):
        step(checkpointed(ours, reentrant=True))


def cut(module: Chained) -> Callable[[Tensor, RouterContext], TokenChoice]:
    """The same forward, with the previous routing's graph cut off."""
    from dataclasses import replace

    from moetk.routing import detached

    def forward(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        if ctx.previous is not None:
            ctx = replace(ctx, previous=detached(ctx.previous))
        return Chained.forward(module, x_TH, ctx)

    return forward


def test_a_router_that_reads_the_previous_routing_says_so() -> None:
    """Kept for routers that declare it; anyone else is told, and not given None."""

    def reads(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        if ctx.previous is not None:
            assert ctx.previous.num_experts == E
        return even(x_TH, ctx)

    with pytest.raises(ReplaceError, match="Set `reads_previous = True` on the router"):
        step(replaced(stock("olmoe"), lambda spec: reads))
    reads.reads_previous = True  # type: ignore[attr-defined]
    step(replaced(stock("olmoe"), lambda spec: reads))


def test_a_layer_that_kept_its_own_router_is_a_previous_one_too() -> None:
    torch.manual_seed(0)
    step(replaced(stock("olmoe"), lambda spec: Chained(spec) if spec.moe_index else None))


def test_the_first_layer_has_no_previous_routing() -> None:
    def reads(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        ctx.require("previous")
        return even(x_TH, ctx)

    with pytest.raises(MissingContextError, match="first mixture-of-experts layer"):
        step(replaced(stock("olmoe"), lambda spec: reads))


NOISY: dict[str, Callable[[Any], nn.Module]] = {
    "noisy_top_k": lambda spec: NoisyTopKRouter(spec.hidden_size, spec.num_experts, spec.top_k),
    "jitter": lambda spec: SwitchRouter(spec.hidden_size, spec.num_experts, jitter=0.3),
}


@families
@pytest.mark.parametrize("noise", NOISY)
def test_noise_is_drawn_again_the_same(family: str, noise: str) -> None:
    torch.manual_seed(0)
    ours = replaced(stock(family), NOISY[noise], seed=7).train()
    twins = [copy.deepcopy(ours) for _ in range(2)]
    found = step(ours)
    for twin, reentrant in zip(twins, (False, True), strict=True):
        assert_equal(step(checkpointed(twin, reentrant=reentrant)), found)
    assert not torch.equal(step(ours)["logits"], found["logits"])  # the next forward draws anew
    ours.eval()
    assert torch.equal(step(ours)["logits"], step(ours)["logits"])


class Spy:
    """A router that keeps every context it is given."""

    def __init__(self) -> None:
        self.seen: list[RouterContext] = []

    def __call__(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        self.seen.append(ctx)
        return even(x_TH, ctx)


@families
def test_context(family: str) -> None:
    spy, prompt = Spy(), ids(2, 5)
    model = stock(family, torch.float32).eval()
    replace_moe(model, lambda spec: spy)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    model(input_ids=prompt, attention_mask=mask)
    first, second = spy.seen
    for ctx in (first, second):
        assert torch.equal(ctx.token_ids, prompt.flatten())
        assert torch.equal(ctx.token_mask, mask.flatten().bool())
        assert torch.equal(ctx.positions, torch.arange(5).repeat(2))
        assert ctx.batch_shape == (2, 5)
        assert ctx.replay is None and ctx.label_mask is None
    assert first.previous is None and second.previous is not None
    assert first.where != second.where and first.seed != second.seed


@families
def test_context_of_cached_steps(family: str) -> None:
    spy, prompt = Spy(), ids(2, 5)
    model = stock(family, torch.float32).eval()
    replace_moe(model, lambda spec: spy)
    mask = torch.ones_like(prompt)
    prompt[1, :2] = mask[1, :2] = 0
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=3, eos_token_id=None, pad_token_id=0
    )
    prefill, *cached = spy.seen[::2]
    assert prefill.batch_shape == (2, 5)
    assert torch.equal(prefill.token_mask, mask.flatten().bool())
    assert torch.equal(prefill.positions.view(2, 5)[0], torch.arange(5))
    assert torch.equal(prefill.positions.view(2, 5)[1, 2:], torch.arange(3))
    assert len(cached) == 2
    for step_number, ctx in enumerate(cached):
        assert ctx.batch_shape == (2, 1)
        assert torch.equal(ctx.token_ids, out[:, 5 + step_number])
        assert ctx.token_mask.tolist() == [True, True]
        assert ctx.positions.tolist() == [5 + step_number, 3 + step_number]


def by_token_id(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
    """A hash router of its own: the choice and the weights depend on ids, positions and mask."""
    start_T1 = ctx.require("token_ids")[:, None] + ctx.require("positions")[:, None]
    experts_TK = (start_T1 + torch.arange(K)) % E
    weights_TK = (1 + x_TH[:, :K].sigmoid()) * ctx.require("token_mask")[:, None]
    return TokenChoice(experts_TK, weights_TK, E)


@families
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_a_recompute_sees_its_own_forward(family: str, reentrant: bool) -> None:
    """Two forwards with other ids, positions and masks before one backward."""
    plain = replaced(stock(family), lambda spec: by_token_id)
    found = []
    for model in (plain, checkpointed(copy.deepcopy(plain), reentrant=reentrant)):
        model.zero_grad()
        losses = []
        for seed, length in ((1, 12), (2, 9)):
            mask = torch.ones(2, length, dtype=torch.int64)
            mask[seed - 1, -seed:] = 0
            out = model(input_ids=ids(2, length, seed=seed), attention_mask=mask, use_cache=False)
            losses.append(out.logits.square().mean() * seed)
        sum(losses).backward()
        found.append(gradients(model))
    assert_equal(*found)


# The way back.


def trace(model: Any) -> dict[str, tuple[type, tuple[str, ...], int]]:
    """Of every module its class, its attributes' names, and how many hooks hang on it."""
    return {
        name: (
            type(module),
            tuple(vars(module)),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
        )
        for name, module in model.named_modules()
    }


@families
@pytest.mark.parametrize("factory", [None, cosine], ids=["stock_router", "custom"])
def test_restore(family: str, factory: Any) -> None:
    model = stock(family)
    before, want, config = trace(model), step(model), model.config.to_dict()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    replacement = replace_moe(model, factory)
    assert trace(model) != before
    step(model)
    replacement.restore()
    assert trace(model) == before
    assert model.config.to_dict() == config
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    for name, tensor in step(model).items():
        assert torch.equal(tensor, want[name]), name


@families
def test_replaced_twice(family: str) -> None:
    model = stock(family)
    before, want = trace(model), step(model)
    replace_moe(model, cosine)
    second = replace_moe(model)
    assert_equal(step(model), want)
    assert not [name for name in model.state_dict() if ".moetk." in name]
    second.restore()
    assert trace(model) == before


@families
def test_classes_keep_their_names(family: str) -> None:
    """transformers' recorders, FSDP's wrapping and _no_split_modules are keyed on them."""
    model = stock(family)
    for module, twin in zip(model.modules(), replaced(model).modules(), strict=True):
        assert isinstance(twin, type(module))
        for key in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(twin), key) == getattr(type(module), key)


def test_equal_layers_share_a_class() -> None:
    ours, other = replaced(stock("mixtral")), replaced(stock("mixtral"))
    classes = {type(layer) for model in (ours, other) for layer in model.model.layers}
    assert len(classes) == 1


# What is refused.


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_transformers_loss_on_another_router(family: str) -> None:
    ours = replaced(stock(family), cosine)
    message = re.escape(
        "output_router_logits=True adds transformers' own balancing loss, a softmax and top-k of "
        "the logits, but CosineRouter in model.layers."
    )
    with pytest.raises(AuxScaleError, match=message):
        ours(input_ids=ids(), labels=ids(), output_router_logits=True)
    ours(input_ids=ids(), labels=ids())  # the refusal leaves no forward open


def test_transformers_loss_on_a_router_of_its_shape() -> None:
    def factory(spec: Any) -> MixtralRouter:
        return MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)

    ours = replaced(stock("qwen3_moe"), factory)
    out = ours(input_ids=ids(), labels=ids(), output_router_logits=True)
    out.aux_loss.backward()
    assert gradients(ours)["model.layers.0.mlp.gate.moetk.weight"].abs().max() > 0


def returns(value: Any) -> Callable[[Any], Any]:
    return lambda spec: lambda x_TH, ctx: value(x_TH)


def choice(x_TH: Tensor, **changes: Any) -> TokenChoice:
    experts_TK = (torch.arange(len(x_TH))[:, None] + torch.arange(2)) % E
    weights_TK = x_TH.new_full((len(x_TH), 2), 0.5)
    values = {"experts_TK": experts_TK, "weights_TK": weights_TK, "num_experts": E, **changes}
    return TokenChoice(**values)


def at_three(value: float, of: Callable[[TokenChoice], Tensor]) -> Callable[[Tensor], Tensor]:
    def changed(x_TH: Tensor) -> Tensor:
        tensor = of(choice(x_TH)).clone()
        tensor[3, 1] = value
        return tensor

    return changed


WRONG: list[tuple[Callable[[Tensor], Any], type[MoetkError], type[Exception], str]] = [
    (lambda x: x, MoeDtypeError, TypeError, "returned Tensor; a router returns a TokenChoice"),
    (
        lambda x: choice(x[:-1]),
        MoeShapeError,
        ValueError,
        "experts_TK is (23, 2), expected (T=24, K)",
    ),
    (
        lambda x: choice(x, weights_TK=x[:, :3]),
        MoeShapeError,
        ValueError,
        "weights_TK is (24, 3), experts_TK (24, 2)",
    ),
    (
        lambda x: choice(x, num_experts=9),
        MoeShapeError,
        ValueError,
        "num_experts=9 in the routing, but the bank has 8 experts",
    ),
    (
        lambda x: choice(x, logits_TE=x[:, :7]),
        MoeShapeError,
        ValueError,
        "logits_TE is (24, 7), expected (T=24, E=8)",
    ),
    (
        lambda x: choice(x, experts_TK=choice(x).experts_TK.int()),
        MoeDtypeError,
        TypeError,
        "experts_TK is torch.int32; ids are torch.int64",
    ),
    (
        lambda x: choice(x, weights_TK=choice(x).experts_TK),
        MoeDtypeError,
        TypeError,
        "weights_TK is torch.int64; weights are floating",
    ),
    (
        lambda x: choice(x, experts_TK=at_three(8, lambda c: c.experts_TK)(x)),
        ExpertIndexError,
        IndexError,
        "experts_TK has id 8 at token 3, column 1, but there are 8 experts",
    ),
    (
        lambda x: choice(x, experts_TK=at_three(3, lambda c: c.experts_TK)(x)),
        DuplicateExpertError,
        ValueError,
        "token 3 names an expert twice, [3, 3]",
    ),
    (
        lambda x: choice(x, weights_TK=at_three(float("nan"), lambda c: c.weights_TK)(x)),
        NonFiniteRoutingError,
        FloatingPointError,
        "weights_TK has 1 values that are not finite, the first (nan) at token 3, column 1",
    ),
]


@pytest.mark.parametrize(("value", "error", "builtin", "says"), WRONG)
def test_malformed_routings(value: Any, error: type, builtin: type, says: str) -> None:
    ours = replaced(stock("olmoe"), returns(value))
    with pytest.raises(error, match=re.escape(says)) as caught:
        ours(input_ids=ids())
    assert isinstance(caught.value, builtin)
    assert " in model.layers.0.mlp" in str(caught.value)


def test_a_factory_that_returns_no_router() -> None:
    model = stock("olmoe")
    before = trace(model)
    with pytest.raises(
        RouterConfigError, match="router factory returned int for model.layers.0.mlp; it returns a"
    ):
        replace_moe(model, lambda spec: 3)  # type: ignore[arg-type,return-value]
    assert trace(model) == before


def test_a_factory_that_fails_names_the_layer_and_leaves_the_model() -> None:
    model = stock("olmoe")
    before = trace(model)

    def factory(spec: Any) -> MixtralRouter:
        return MixtralRouter(spec.hidden_size, spec.num_experts, 9 if spec.layer else 2)

    with pytest.raises(RouterConfigError, match="top_k=9 but num_experts=8") as caught:
        replace_moe(model, factory)
    assert caught.value.__notes__ == ["while building the router of model.layers.1.mlp"]
    assert trace(model) == before


def test_a_failed_second_replacement_leaves_the_first() -> None:
    model = stock("olmoe")
    replace_moe(model, cosine)
    want = step(model)
    with pytest.raises(RouterConfigError):
        replace_moe(model, lambda spec: "router")  # type: ignore[arg-type,return-value]
    assert_equal(step(model), want)


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("fast", 'backend=\'fast\' is not one of this version: "auto", "stock" (in a model), '),
        ("", "backend='' is not one of this version"),
    ],
)
def test_backend_names(backend: str, says: str) -> None:
    model = stock("olmoe")
    before = trace(model)
    with pytest.raises(BackendError, match=re.escape(says)):
        replace_moe(model, backend=backend)
    assert trace(model) == before


@pytest.mark.parametrize("backend", ["auto", "stock", "grouped"])
def test_gradients_are_added_by_backends_that_can(backend: str) -> None:
    model = stock("olmoe")
    before = trace(model)
    message = f'add_to_grad=True needs backend="fused" or "te", not "{backend}".'
    with pytest.raises(BackendError, match=re.escape(message)):
        replace_moe(model, backend=backend, add_to_grad=True)
    assert trace(model) == before


def test_stock_experts_take_no_dispatcher() -> None:
    from moetk.dispatch import Local

    with pytest.raises(BackendError, match="runs transformers' own experts: dispatcher=None"):
        replace_moe(stock("olmoe"), backend="stock", dispatcher=Local())


def test_a_family_without_a_row() -> None:
    from transformers import AutoModelForCausalLM, PhimoeConfig

    config = PhimoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    before = trace(model)
    with pytest.raises(UnsupportedModelError, match='without a row .*backend="stock"') as caught:
        replace_moe(model)
    assert "PhimoeSparseMoeBlock" in str(caught.value)
    assert isinstance(caught.value, NotImplementedError)
    assert trace(model) == before


def test_what_is_no_transformers_model() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not, and does not hold, a transf"):
        replace_moe(nn.Linear(2, 2))


def test_a_model_on_the_meta_device() -> None:
    with pytest.raises(ReplaceError, match="on the meta device: replace after the weights"):
        replace_moe(stock("olmoe").to("meta"))


def test_a_forward_that_another_library_set() -> None:
    model = stock("olmoe")
    before = trace(model)
    experts = model.model.layers[1].mlp.experts
    experts.forward = lambda *args: type(experts).forward(experts, *args)
    with pytest.raises(ReplaceError, match="OlmoeExperts has a forward of its own on the instance"):
        replace_moe(model)
    del experts.forward
    assert trace(model) == before


def test_a_dense_model_stays_as_it_is() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    before = trace(model)
    replacement = replace_moe(model)
    assert trace(model) == before and not replacement.sites
    replacement.restore()
    assert trace(model) == before


def test_explain() -> None:
    model = stock("deepseek_v3", torch.float32)
    text = replace_moe(model, lambda spec: cosine(spec) if spec.layer == 2 else None).explain()
    lines = text.splitlines()
    assert "DeepseekV3ForCausalLM: 2 layers" in lines[0]
    rows = {line.split()[0]: line for line in lines if line.strip().startswith("model.layers")}
    assert rows.keys() == {"model.layers.1.mlp", "model.layers.2.mlp"}
    assert "composed" in rows["model.layers.1.mlp"]
    assert "CosineRouter (custom)" in " ".join(rows["model.layers.2.mlp"].split())
    assert "auto: grouped" in text and "auto on cpu, float32" in text
    stays = replace_moe(model, backend="stock").explain()
    assert 'asked for with backend="stock"' in stays
