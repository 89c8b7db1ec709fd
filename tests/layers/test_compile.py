"""One graph: torch.compile(fullgraph=True) of a replaced model, forward and backward."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.layers.stock import assert_equal, checkpointed, replaced, stock
from tests.layers.test_replace import Chained, cosine
from tests.tiny import FAMILIES, ids

# Stock's linear attention has no traceable backward (a row of limits.py); the rest compiles with
# our experts on either version, also where stock's own do not.
TRACEABLE = [family for family in FAMILIES if family != "qwen3_next"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(family: str, router: Any = None) -> Any:
    changes = {"num_hidden_layers": 2} if family == "deepseek_v3" else {}
    model = replaced(stock(family, torch.float32, **changes), router).train()
    model.config.use_cache = False
    return model


def graph(model: Any, backend: str = "aot_eager", **settings: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend, **settings)


def run(call: Any, model: Any, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = call(input_ids=token_ids, labels=token_ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", TRACEABLE)
def test_equals_eager(family: str) -> None:
    """With every layer recomputed in backward, the harder half; without it below."""
    model = model_of(family)
    want = run(model, model, ids())
    checkpointed(model, reentrant=False)
    assert_equal(run(graph(model), model, ids()), want, bound=2e-5)
    assert_equal(run(model, model, ids()), want, bound=2e-5)  # and eager again, after it


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == "gpt_oss" else [pytest.mark.slow])
        for name in TRACEABLE
    ],
)
def test_equals_eager_without_checkpointing(family: str) -> None:
    model = model_of(family)
    assert_equal(run(graph(model), model, ids()), run(model, model, ids()), bound=2e-5)


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "checkpointed"])
def test_a_router_of_ones_own(recomputed: bool) -> None:
    model = model_of("qwen3_moe", cosine)
    want = run(model, model, ids())
    assert any(".moetk." in name for name in want)
    if recomputed:
        checkpointed(model, reentrant=False)
    assert_equal(run(graph(model), model, ids()), want, bound=2e-5)


def test_the_previous_routing_in_one_graph() -> None:
    torch.manual_seed(0)
    model = model_of("olmoe", Chained)
    assert_equal(run(graph(model), model, ids()), run(model, model, ids()), bound=2e-5)


def test_the_previous_routing_cannot_leave_a_recomputed_region() -> None:
    """Never silently without its gradient: the router is told that there is none."""
    model = checkpointed(model_of("olmoe", Chained), reentrant=False)
    with pytest.raises(Exception, match="needs ctx.previous, which is None"):
        run(graph(model), model, ids())


def test_steps_never_compile_again_and_other_lengths_once() -> None:
    model = model_of("qwen3_moe")
    call = graph(model)
    run(call, model, ids(2, 12))
    graphs = counters["stats"]["unique_graphs"]
    for seed in (2, 3):
        run(call, model, ids(2, 12, seed=seed))
    assert counters["stats"]["unique_graphs"] == graphs
    for length in (13, 14, 17):
        found = run(call, model, ids(2, length))
        assert_equal(found, run(model, model, ids(2, length)), bound=2e-5)
    assert counters["stats"]["unique_graphs"] == 2 * graphs


@pytest.mark.slow
def test_inductor() -> None:
    model = model_of("qwen3_moe")
    call = graph(copy.deepcopy(model), backend="inductor")
    assert_equal(run(call, call._orig_mod, ids()), run(model, model, ids()), bound=2e-5)
