"""Residual streams with the norms beside them: what a layer's forward is rewritten to, where it is
not, and that the model stays the stock one, with the twins and with the kernels themselves."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moetk.kernels.norm import added_rms_norm, forked_rms_norm
from moetk.layers.step import residual as part
from moetk.layers.step import speed_up
from moetk.layers.step.joined import joined
from moetk.layers.step.under import stock_class
from tests.interpreted import outcomes_of, tell
from tests.layers.stock import assert_bitwise, assert_equal, checkpointed, step, stock
from tests.parallel.ranks import run_on_ranks
from tests.tiny import FAMILIES, ids

BF16 = torch.bfloat16
BOTH = {"forked": ["input_layernorm"], "added": ["post_attention_layernorm"]}
SCALED = {"forked": ["input_layernorm", "post_attention_layernorm"], "added": []}
LINES = {**dict.fromkeys(FAMILIES, BOTH), "granitemoe": SCALED}
"""Which norms of a family's layers are joined with what."""
del LINES["deepseek_v4"]  # has no residual stream, but several


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the joined functions were called, in order."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        calls.append(name)
        return function(*args, **settings)

    for name, function in (("added", added_rms_norm), ("forked", forked_rms_norm)):
        monkeypatch.setattr(part, f"{name}_rms_norm", partial(watched, name, function))
    return calls


def single(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return stock(family, dtype, **changes).train()


def fast(model: Any, **parts: bool) -> Any:
    """A copy with norms and residuals sped up, whose sums are then in stock's order."""
    model = copy.deepcopy(model)
    speed_up(model, **{"rope": False, "loss": False, **parts})
    return model


def explained(model: Any) -> str:
    """The row of the residuals."""
    rows = " ".join(vars(model)["_moetk_speed_up"].explain().split())
    return rows.split("residual ", 1)[1].split(" rope ")[0]


# In a model.


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("family", LINES)
def test_a_model_is_the_stock_one_to_the_bit(
    family: str, dtype: torch.dtype, taken: list[str]
) -> None:
    model = single(family, dtype)
    want = step(model)
    assert_bitwise(step(fast(model)), want)
    lines, layers = LINES[family], len(model.model.layers)
    assert taken.count("forked") == layers * len(lines["forked"])
    assert taken.count("added") == layers * len(lines["added"])
    for layer in model.model.layers:
        found = joined(stock_class(layer).forward)
        assert {"forked": [*found.forked], "added": [*found.added]} == lines
    assert_bitwise(step(model), want)  # which was not sped up


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_layer_runs_it_twice(reentrant: bool, taken: list[str]) -> None:
    model = single()
    ours = checkpointed(fast(model), reentrant=reentrant)
    assert_equal(step(ours), step(model), bound=1e-5)
    assert taken.count("added") == 2 * len(model.model.layers)


def test_generation_and_caches(taken: list[str]) -> None:
    model = single("qwen3_next").eval()
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast(model).generate(ids(), **settings), model.generate(ids(), **settings))
    assert taken


@pytest.mark.parametrize("off", ["norm", "residual"])
def test_switched_off(off: str, taken: list[str]) -> None:
    model = single()
    ours = fast(model, **{off: False})
    assert_bitwise(step(ours), step(model))
    assert not taken
    if off == "norm":
        assert "stock: input_layernorm is left stock, post_attention_layernorm" in explained(ours)
    else:
        assert "stock: asked for with residual=False" in explained(ours)


def test_a_model_in_float64_keeps_its_sums(taken: list[str]) -> None:
    model = single(dtype=torch.float64)
    ours = fast(model)
    assert_bitwise(step(ours), step(model))
    assert not taken
    assert "families differ in what they take in fp32 of a model in float64" in explained(ours)


def test_sped_up_twice_it_is_still_there(taken: list[str]) -> None:
    model = fast(single())
    text = explained(model)
    assert "plain torch: input_layernorm and the stream beside it, post_attention" in text
    speed_up(model, rope=False, loss=False)
    assert explained(model) == text
    step(model)
    assert taken == ["forked", "added"] * 2
    model._moetk_speed_up.restore()
    step(model)
    assert taken == ["forked", "added"] * 2


def test_scaled_sums_are_left_alone() -> None:
    model = single("granitemoe", residual_multiplier=0.3)
    ours = fast(model)
    assert_bitwise(step(ours), step(model))
    assert "the stream beside it; stock: no sum before a norm is plain" in explained(ours)
    assert not torch.equal(step(single("granitemoe"))["logits"], step(model)["logits"])


def test_hyper_connections_are_refused() -> None:
    text = explained(fast(single("deepseek_v4"), loss=True))
    assert "stock: its forward norms nothing beside a residual stream" in text


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm"])
def test_a_hooked_norm_is_called(name: str, taken: list[str]) -> None:
    model = single()
    ours = fast(model)
    for each in (model, ours):
        norm = getattr(each.model.layers[0], name)
        norm.register_forward_hook(lambda module, args, out: 2 * out)
    assert_bitwise(step(ours), step(model))
    left = {"input_layernorm": "added", "post_attention_layernorm": "forked"}
    assert sorted(taken) == sorted(["added", "forked", left[name]])  # layer 1, and half of layer 0
    assert f"stock: {name} is hooked and must be called" in explained(ours)
    assert not torch.equal(step(single())["logits"], step(ours)["logits"])


def test_hooks_around_it_see_what_they_see_in_stock() -> None:
    def seen(model: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str, module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found[f"{name} in"] = given.detach().clone()
            found[f"{name} out"] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        for index, layer in enumerate(model.model.layers):
            for name in ("", "self_attn", "mlp"):
                layer.get_submodule(name).register_forward_hook(
                    partial(keep, f"{index} {name}"), with_kwargs=True
                )
        step(model)
        return found

    model = single()
    assert_bitwise(seen(fast(model)), seen(model))


def test_another_norm_put_in_later_is_called(taken: list[str]) -> None:
    model = single()
    ours = fast(model)
    for each in (model, ours):
        each.model.layers[0].post_attention_layernorm = nn.Identity()
    assert_bitwise(step(ours), step(model))
    assert taken == ["forked", "forked", "added"]


def test_under_autocast_the_stream_is_wider_than_its_branch(taken: list[str]) -> None:
    model = single()
    with torch.autocast("cpu", dtype=BF16):
        assert_bitwise(step(fast(model)), step(model))
    assert taken == ["forked"] * 4  # the sum is torch's, which promotes


def test_a_branch_that_broadcasts_is_left_to_torch(taken: list[str]) -> None:
    model = fast(single())
    layer = model.model.layers[0]
    stream, branch = torch.randn(2, 3, 32), torch.randn(32)
    total, normed = layer._moetk_added(stream, branch, layer.input_layernorm)
    assert torch.equal(total, stream + branch)
    assert torch.equal(normed, layer.input_layernorm(total))
    assert taken == ["forked"]


def test_a_class_patched_later_is_obeyed(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    model = fast(single())
    layer: Any = stock_class(model.model.layers[0])
    original = layer.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", patched)
        want = step(single())
        assert_bitwise(step(model), want)
        assert not taken
        assert "stock: its class was given another forward" in explained(model)
        speed_up(model, rope=False, loss=False)
        assert "variables around it" in explained(model)
        assert_bitwise(step(model), want)
    speed_up(model, rope=False, loss=False)
    assert_bitwise(step(model), step(single()))
    assert taken


def test_compiles_to_one_graph() -> None:
    """A layer alone: experts of transformers do not compile on every version."""
    model = single("mixtral", num_hidden_layers=1)
    ours = fast(model)
    compiled, plain = ours.model.layers[0], model.model.layers[0]
    for layer in (compiled, plain):
        layer.mlp = nn.Linear(32, 32, bias=False)
        nn.init.eye_(layer.mlp.weight)
    x = torch.randn(2, 5, 32, requires_grad=True)
    angles = torch.randn(1, 5, 8)
    torch._dynamo.reset()
    run: Any = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    found = []
    for layer in (run, plain):
        y = layer(x, position_embeddings=(angles.cos(), angles.sin()))
        found.append({"y": y.detach(), "dx": torch.autograd.grad(y.sum(), x)[0]})
    torch._dynamo.reset()
    assert_equal(*found, bound=1e-6)


def sped_up_on_a_rank(rank: int) -> None:
    """Under DDP and FSDP2, sped up before or after; FSDP2 may hold a norm by itself: by a hook."""
    want = gradients_of(single())
    for hold in (DistributedDataParallel, sharded, partial(sharded, norms=True)):
        for first in (True, False):
            model = single()
            if first:
                speed_up(model, loss=False)
            held: Any = hold(model)
            if not first:
                speed_up(held, loss=False)
            left = isinstance(hold, partial)
            assert_equal(gradients_of(held), want, bound=1e-4)
            text = explained(model)
            assert ("post_attention_layernorm is hooked and must be called" in text) == left
            assert "moetk, plain torch: input_layernorm and the stream beside it" in text


def gradients_of(held: Any) -> dict[str, Tensor]:
    step(held)
    found = {n.removeprefix("module."): p.grad for n, p in held.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def sharded(model: Any, norms: bool = False) -> Any:
    for layer in model.model.layers:
        if norms:
            fully_shard(layer.post_attention_layernorm)
        fully_shard(layer)
    return fully_shard(model)


def test_two_ranks() -> None:
    run_on_ranks(sped_up_on_a_rank)


# The forward, rewritten.


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.drop = nn.Tanh(), nn.Sigmoid(), nn.Identity()

    def _moetk_forked(self, stream: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        return stream, norm(stream)

    def _moetk_added(self, stream: Tensor, branch: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        return stream + branch, norm(stream + branch)


class OtherNames(Layer):
    def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 1.0) -> Tensor:
        """Names, comments, defaults and blocks are a layer's own.

        So is what is written over several lines.
        """
        # kept
        shortcut = x
        x = self.norm(x)

        if scale:
            x = doubled(x) * scale + shift
            x = shortcut + x  # a comment between
            shortcut = x

            x = self.inner(x)
        return shortcut + x


class NotThese(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        x = residual + self.drop(x)
        residual = x
        x = self.inner(x)
        x = x + residual
        residual = x
        x = self.norm(x)
        x = residual - x
        residual = x.clone()
        x = self.norm(x)
        residual = x + residual
        x = self.norm(x)
        other = residual + x
        residual = x
        x = self.norm(other)
        return x + residual


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        residual += x
        return residual


class Written(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        return residual.add_(x)


class Nothing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class Above(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        return residual + x + len(super().__repr__())


def through(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Decorated(Layer):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm(x)
        return residual + x


@pytest.mark.parametrize(
    ("layer", "added", "forked"),
    [(OtherNames, ["inner"], ["norm"]), (NotThese, [], ["norm", "inner", "norm"])],
)
def test_only_the_very_lines_are_joined(layer: Any, added: Any, forked: Any) -> None:
    found = joined(layer.forward)
    assert ([*found.added], [*found.forked], found.why_not) == (added, forked, None)
    assert inspect.signature(found.forward) == inspect.signature(layer.forward)
    module, x = layer(), torch.randn(3, 4)
    assert torch.equal(found.forward(module, x), module(x))
    if layer is OtherNames:
        assert torch.equal(found.forward(module, x, 0.0), module(x, 0.0))
        assert torch.equal(found.forward(module, x, shift=3.0), module(x, shift=3.0))
        assert not torch.equal(module(x, shift=3.0), module(x))


def test_a_traceback_shows_the_lines_that_ran() -> None:
    source = inspect.getsource(joined(OtherNames.forward).forward)
    assert "shortcut, x = self._moetk_added(shortcut, x, self.inner)" in source


def misread(self: Any, x: Tensor) -> Tensor:
    residual = x
    x = self.norm(x)
    return residual + x


misread.__code__ = OtherNames.forward.__code__.replace(
    co_firstlineno=misread.__code__.co_firstlineno
)
UNREAD: dict[str, Any] = {}
exec("def forward(self, x):\n    residual = x\n    x = self.norm(x)\n    return x", UNREAD)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (InPlace.forward, "may write into the residual stream"),
        (Written.forward, "may write into the residual stream"),
        (Nothing.forward, "norms nothing beside a residual stream"),
        (Above.forward, "reads variables around it"),
        (Decorated.forward, "its forward is wrapped"),
        (through(OtherNames.forward), "its forward is wrapped"),
        (partial(OtherNames.forward), "its forward is wrapped"),
        (misread, "is not what its source says"),
        (UNREAD["forward"], "the source of its forward is not there"),
    ],
)
def test_a_forward_that_says_more_is_left_alone(forward: Any, why: str) -> None:
    found = joined(forward)
    assert found.why_not is not None and why in found.why_not
    assert found.forward is forward and not found.added + found.forked


# With the kernels, in Triton's interpreter.


def with_kernels(run: Callable[[Any], dict[str, Tensor]], **changes: Any) -> None:
    """`run` of a model on the CPU whose joined lines run Triton's kernels, against stock."""
    from moetk.kernels.gpu import norm

    launched = []

    def kernels(function: Callable[..., Any], *args: Any, **rule: Any) -> Any:
        launched.append(function)
        return function(*args, rule["eps"], rule["offset"], rule["rounds_first"])

    model = single(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "added_rms_norm", partial(kernels, norm.added_rms_norm_fused))
        patch.setattr(part, "forked_rms_norm", partial(kernels, norm.forked_rms_norm_fused))
        patch.setattr(norm, "PROGRAMS", 3)
        found = run(fast(model))
    assert len(set(launched)) == 2
    assert_equal(found, run(model), bound=1e-5)


def frozen(model: Any) -> dict[str, Tensor]:
    """As for adapters: the stream that enters the first layer has no gradient."""
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(False)
    return step(model)


def unseen(model: Any) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {"logits": model(input_ids=ids()).logits}


CASES: dict[str, Callable[[], None]] = {
    **{f: partial(with_kernels, step, family=f) for f in ("qwen3_moe", "gpt_oss", "qwen3_next")},
    "checkpointed": partial(with_kernels, lambda m: step(checkpointed(m, reentrant=False))),
    "reentrant": partial(with_kernels, lambda m: step(checkpointed(m, reentrant=True))),
    "frozen": partial(with_kernels, frozen),
    "inference mode": partial(with_kernels, unseen),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_with_kernels(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]


if __name__ == "__main__":
    tell(CASES)
