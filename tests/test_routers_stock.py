"""Composed from moetk's parts, the router of each family is transformers' router, bit for bit."""

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    GptOssRouter,
    LinearRouter,
    MixtralRouter,
)
from moetk.routing import TokenChoice, check_routing

pytestmark = pytest.mark.v5

T, H, E, K, VOCAB = 257, 24, 16, 4, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def stock(family: str, router: str, config: str, **settings: object) -> nn.Module:
    models = f"transformers.models.{family}"
    make_config = getattr(import_module(f"{models}.configuration_{family}"), config)
    make_router = getattr(import_module(f"{models}.modeling_{family}"), router)
    gate = make_router(make_config(hidden_size=H, num_experts_per_tok=K, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*gate.parameters(), *gate.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    assert gate.num_experts == E
    return gate


def deepseek_v3(groups: int, top_groups: int, renormalise: bool) -> tuple[nn.Module, LinearRouter]:
    gate = stock(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        n_routed_experts=E,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    ours = DeepSeekV3Router(
        H,
        E,
        K,
        groups=groups,
        top_groups=top_groups,
        scale=2.5,
        renormalise=renormalise,
        tie="stock",
    )
    return gate, ours


def softmax_first(family: str, name: str, renormalise: bool) -> tuple[nn.Module, LinearRouter]:
    gate = stock(
        family,
        f"{name}TopKRouter",
        f"{name}Config",
        num_experts=E,
        norm_topk_prob=renormalise,
    )
    return gate, MixtralRouter(H, E, K, renormalise=renormalise, tie="stock")


FAMILIES = {
    "mixtral": lambda: (
        stock("mixtral", "MixtralTopKRouter", "MixtralConfig", num_local_experts=E),
        MixtralRouter(H, E, K, tie="stock"),
    ),
    "qwen3_moe": lambda: softmax_first("qwen3_moe", "Qwen3Moe", True),
    "qwen3_moe raw": lambda: softmax_first("qwen3_moe", "Qwen3Moe", False),
    "qwen3_next": lambda: softmax_first("qwen3_next", "Qwen3Next", True),
    "olmoe": lambda: softmax_first("olmoe", "Olmoe", False),
    "deepseek_v3": lambda: deepseek_v3(4, 2, True),
    "deepseek_v3 no groups": lambda: deepseek_v3(1, 1, True),
    "deepseek_v3 raw": lambda: deepseek_v3(4, 2, False),
    "deepseek_v4": lambda: (
        stock(
            "deepseek_v4",
            "DeepseekV4TopKRouter",
            "DeepseekV4Config",
            n_routed_experts=E,
            routed_scaling_factor=1.5,
        ),
        DeepSeekV4Router(H, E, K, scale=1.5, tie="stock"),
    ),
    "gpt_oss": lambda: (
        stock("gpt_oss", "GptOssTopKRouter", "GptOssConfig", num_local_experts=E),
        GptOssRouter(H, E, K, tie="stock"),
    ),
    "granitemoe": lambda: (
        stock("granitemoe", "GraniteMoeTopKRouter", "GraniteMoeConfig", num_local_experts=E),
        GptOssRouter(H, E, K, bias=False, score_dtype=torch.float32, tie="stock"),
    ),
}


def hidden(dtype: torch.dtype, num_tokens: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(num_tokens, H, generator=generator).to(dtype)
    x_TH[: num_tokens // 8] = 0  # rows where all experts tie
    return x_TH.requires_grad_()


def outputs(result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, ids), whatever order this family and version returns them in."""
    (ids,) = (t for t in result if not t.is_floating_point())
    (logits,) = (t for t in result if t.is_floating_point() and t.shape[1] == E)
    (weights,) = (t for t in result if t.is_floating_point() and t.shape[1] == K)
    return logits, weights, ids


def by_id(values_TK: Tensor, ids_TK: Tensor) -> Tensor:
    """Columns in ascending id; equal ids keep their order."""
    return values_TK.gather(1, ids_TK.argsort(dim=-1, stable=True))


def assert_same(gate: nn.Module, ours: nn.Module, ctx: RouterContext, *stock_args: Tensor) -> None:
    dtype = gate.weight.dtype
    x_stock_TH, x_TH = hidden(dtype), hidden(dtype)
    logits_TE, weights_TK, ids_TK = outputs(gate(x_stock_TH, *stock_args))
    routing: TokenChoice = ours(x_TH, ctx)
    check_routing(routing, T, E, where="ours", duplicates=getattr(type(ours), "duplicates", False))
    rounded_TK = routing.weights_TK.to(weights_TK.dtype)  # as the family hands weights to its bank

    assert routing.logits_TE.dtype == logits_TE.dtype
    assert torch.equal(routing.logits_TE, logits_TE)
    assert torch.equal(by_id(routing.experts_TK, routing.experts_TK), by_id(ids_TK, ids_TK))
    assert torch.equal(by_id(rounded_TK, routing.experts_TK), by_id(weights_TK, ids_TK))

    upstream_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(2)).to(weights_TK.dtype)
    (weights_TK * upstream_TE.gather(1, ids_TK)).sum().backward()
    (rounded_TK * upstream_TE.gather(1, routing.experts_TK)).sum().backward()
    assert torch.equal(x_stock_TH.grad, x_TH.grad)
    for (name, theirs), (ours_name, mine) in zip(
        gate.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert name == ours_name and torch.equal(theirs.grad, mine.grad), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_weights_logits_and_gradients_are_bitwise_stock(family, dtype):
    gate, ours = FAMILIES[family]()
    ours.load_state_dict(gate.state_dict())
    assert_same(gate.to(dtype), ours.to(dtype), RouterContext())


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_are_in_descending_choice_even_where_stock_leaves_them_unsorted(family):
    gate, ours = FAMILIES[family]()
    ours.load_state_dict(gate.state_dict())
    routing = ours(hidden(torch.float32), RouterContext())
    choice_TE = routing.logits_TE if routing.choice_TE is None else routing.choice_TE
    chosen_TK = choice_TE.gather(1, routing.experts_TK)
    assert (chosen_TK[:, :-1] >= chosen_TK[:, 1:]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_ones_own_choice_changes_no_bit(family):
    _, ours = FAMILIES[family]()
    first = ours(hidden(torch.float32), RouterContext())
    again = ours(hidden(torch.float32), RouterContext(replay=first.experts_TK))
    assert torch.equal(first.experts_TK, again.experts_TK)
    assert torch.equal(first.weights_TK, again.weights_TK)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hash_router_is_stock_on_tables_with_duplicates(dtype):
    gate = stock(
        "deepseek_v4",
        "DeepseekV4HashRouter",
        "DeepseekV4Config",
        n_routed_experts=E,
        vocab_size=VOCAB,
        routed_scaling_factor=1.5,
    )
    generator = torch.Generator().manual_seed(3)
    gate.tid2eid.copy_(torch.randint(E, (VOCAB, K), generator=generator))
    assert any(len(set(row)) < K for row in gate.tid2eid.tolist())
    ours = DeepSeekV4HashRouter(H, E, K, vocab_size=VOCAB, scale=1.5)
    ours.load_state_dict(gate.state_dict())
    token_ids_T = torch.randint(VOCAB, (T,), generator=generator)
    ctx = RouterContext(token_ids=token_ids_T)
    assert_same(gate.to(dtype), ours.to(dtype), ctx, token_ids_T)
    assert torch.equal(ours(hidden(dtype), ctx).experts_TK, gate.tid2eid[token_ids_T])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_gate_runs_our_forward_with_nothing_but_its_own_tensors_and_settings(family):
    gate, ours = FAMILIES[family]()
    ours.load_state_dict(gate.state_dict())
    expected = ours(hidden(torch.float32), RouterContext())
    settings = {
        name: value
        for name, value in vars(ours).items()
        if not name.startswith("_") and name != "training"
    }
    gate.__class__ = type("Swapped", (type(ours), type(gate)), {})
    for name, value in settings.items():
        setattr(gate, name, value)
    routing = gate(hidden(torch.float32), RouterContext())
    assert torch.equal(routing.experts_TK, expected.experts_TK)
    assert torch.equal(routing.weights_TK, expected.weights_TK)
