"""The chunked loss: transformers' own in every case it knows, and no gradient nobody needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from moetk.errors import ExpertIndexError, MoeDtypeError, MoeShapeError, SecondOrderError
from moetk.kernels.cross_entropy import linear_cross_entropy, plain_cross_entropy_
from moetk.layers.step import speed_up
from moetk.layers.step.loss import _fetched
from tests.layers.stock import assert_bitwise, assert_equal, gradients, stock
from tests.layers.test_step import exact, fast, labels, trained
from tests.tiny import VOCAB, ids


def case(seed: int, T: int, V: int, H: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden_TH, weight_VH, bias_V, labels_T with some rows that have none."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((T, H), (V, H), (V,))
    )
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) < 0.3] = -100
    return hidden, weight, bias, targets


def written_out(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, items: float
) -> Tensor:
    """One row after the other: log of the sum of exponentials, less the label's logit."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    rows = [
        row.exp().sum().log() - row[t] for row, t in zip(logits, targets, strict=True) if t >= 0
    ]
    return sum(rows, 0 * logits.sum()) / items  # type: ignore[return-value]


def results(loss: Tensor, leaves: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), torch.tensor(scale).to(loss.dtype))
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    T=st.integers(1, 9),
    V=st.integers(1, 12),
    chunk=st.integers(1, 10),
    wanted=st.lists(st.booleans(), min_size=3, max_size=3).filter(any),
    has_bias=st.booleans(),
    dropped=st.booleans(),
    as_tensor=st.booleans(),
    scale=st.sampled_from([1.0, -0.25, 3.0]),
)
def test_equals_the_loss_written_out(
    seed: int,
    T: int,
    V: int,
    chunk: int,
    wanted: list[bool],
    has_bias: bool,
    dropped: bool,
    as_tensor: bool,
    scale: float,
) -> None:
    hidden, weight, bias, targets = case(seed, T, V, 3, torch.float64)
    leaves = {"hidden": hidden, "weight": weight}
    if has_bias:
        leaves["bias"] = bias
    for leaf, needs in zip(leaves.values(), wanted, strict=False):
        leaf.requires_grad_(needs)
    if not any(leaf.requires_grad for leaf in leaves.values()):
        hidden.requires_grad_()
    given_bias = bias if has_bias else None
    ours = linear_cross_entropy(
        hidden,
        weight,
        targets,
        torch.tensor(7) if as_tensor else 7,
        bias_V=given_bias,
        rows_N=(targets >= 0).nonzero().squeeze(1) if dropped else None,
        chunk=chunk,
    )
    theirs = written_out(hidden, weight, given_bias, targets, 7)
    got, want = results(ours, leaves, scale), results(theirs, leaves, scale)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, _, targets = case(0, 6, 5, 3, torch.float64)
    for needs in (hidden, weight):
        needs.requires_grad_()
        loss = linear_cross_entropy(hidden, weight, targets, 1)
        saved = [tensor is None for tensor in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
        assert saved == [needs is weight, needs is hidden, True]
        needs.requires_grad_(False)


def test_under_no_grad_logits_are_not_turned_into_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, bias, targets = case(0, 6, 5, 3, torch.float64)
    asked = []

    def watched(*args: Any) -> Tensor:
        asked.append(args[-1])
        return plain_cross_entropy_(*args)

    monkeypatch.setattr("moetk.kernels.cross_entropy.plain_cross_entropy_", watched)
    weight.requires_grad_()
    want = linear_cross_entropy(hidden, weight, targets, 1, bias_V=bias)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, 1, bias_V=bias)
    assert asked == [True, False]
    assert not loss.requires_grad
    assert torch.equal(loss, want)


def test_a_retained_graph_gives_the_same_gradient_twice() -> None:
    hidden, weight, _, targets = case(0, 6, 5, 3, torch.float64)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, 3)
    first = torch.autograd.grad(2 * loss, weight, retain_graph=True)[0]
    second = torch.autograd.grad(2 * loss, weight)[0]
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _, targets = case(0, 6, 5, 3, torch.float64)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, 3)
    with pytest.raises(SecondOrderError, match=r"create_graph=True asks .* Use torch's cross_ent"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("T", [0, 4])
def test_without_a_label_the_mean_is_nan_and_gradients_are_zero_as_in_torch(T: int) -> None:
    hidden, weight, _, _ = case(0, T, 5, 3, torch.float64)
    targets = torch.full((T,), -100)
    none = torch.zeros(0, dtype=torch.int64)
    for rows in (None, none):
        leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
        theirs = F.cross_entropy(hidden @ weight.T, targets)
        ours = linear_cross_entropy(hidden, weight, targets, (targets >= 0).sum(), rows_N=rows)
        got, want = results(ours, leaves), results(theirs, leaves)
        assert got["loss"].isnan() and want["loss"].isnan()
        assert not got["hidden"].any() and not got["weight"].any()
        assert not want["hidden"].any() and not want["weight"].any()
        assert linear_cross_entropy(hidden, weight, targets, 7, rows_N=rows) == 0


def test_a_nan_row_spoils_its_own_gradient_only() -> None:
    hidden, weight, _, targets = case(3, 6, 5, 3, torch.float64)
    targets[:] = torch.arange(6) % 5
    hidden.requires_grad_()
    clean = results(linear_cross_entropy(hidden, weight, targets, 6), {"hidden": hidden})
    with torch.no_grad():
        hidden[2] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets, 6)
    spoiled = results(loss, {"hidden": hidden})
    others = torch.arange(6) != 2
    assert loss.isnan() and spoiled["hidden"][2].isnan().all()
    assert torch.equal(spoiled["hidden"][others], clean["hidden"][others])
    targets[2] = -100
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets, 6)
    assert loss.isfinite() and not results(loss, {"hidden": hidden})["hidden"][2].any()


@pytest.mark.parametrize("accumulate", [torch.float32, torch.bfloat16])
def test_bf16_is_as_near_to_fp64_as_stock_is(accumulate: torch.dtype) -> None:
    """The pass rule, with four chunks; a sum in bf16 passes it too, with less room."""
    hidden, weight, _, targets = case(5, 256, 64, 32, torch.bfloat16)
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    items = int((targets >= 0).sum())
    truth = results(F.cross_entropy(wide["hidden"] @ wide["weight"].T, targets), wide)
    theirs = results(F.cross_entropy(F.linear(hidden, weight).float(), targets), leaves)
    loss = linear_cross_entropy(hidden, weight, targets, items, chunk=64, accumulate=accumulate)
    ours = results(loss, leaves)
    for name, exactly in truth.items():
        floor = 1e-6 * exactly.double().norm()
        error = (ours[name].double() - exactly).norm()
        assert error <= max(2 * (theirs[name].double() - exactly).norm(), floor), name


def test_errors_name_tensor_value_and_fix() -> None:
    hidden, weight, _, targets = case(0, 6, 5, 3, torch.float64)
    with pytest.raises(MoeShapeError, match=r"hidden_TH \(2, 3, 3\) and weight_VH \(5, 3\) need"):
        linear_cross_entropy(hidden.view(2, 3, 3), weight, targets, 1)
    with pytest.raises(MoeShapeError, match=r"labels_T \(4,\) needs one label for each of the 6"):
        linear_cross_entropy(hidden, weight, targets[:4], 1)
    for half in ((hidden.half(), weight), (hidden, weight.half())):
        name = "hidden_TH" if half[1] is weight else "weight_VH"
        with pytest.raises(MoeDtypeError, match=rf"{name} is torch.float16\..* use bfloat16 or"):
            linear_cross_entropy(*half, targets, 1)
    for wrong in (5, -1):
        targets[4] = wrong
        with pytest.raises(
            ExpertIndexError, match=rf"labels_T\[4\] is {wrong}, .* need 0 <= label"
        ):
            linear_cross_entropy(hidden, weight, targets, 1)


@pytest.mark.parametrize("wrong", [5, -1])
def test_a_label_outside_the_vocabulary_is_refused_when_compiled(wrong: int) -> None:
    hidden, weight, _, targets = case(0, 6, 5, 3, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    want = linear_cross_entropy(hidden, weight, targets, 4)
    assert torch.equal(compiled(hidden, weight, targets, 4), want)
    targets[4] = wrong
    with pytest.raises(RuntimeError, match=r"a label is outside 0 \.\. V-1"):
        compiled(hidden, weight, targets, 4)
    torch._dynamo.reset()


def test_the_number_of_labels_is_awaited_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event records on the current device's stream unless it is told another."""
    recorded: list[Any] = []

    class Event:
        def record(self, stream: Any = None) -> None:
            recorded.append(stream)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **kw: empty(*shape, **kw))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    number, _ = _fetched(torch.tensor(5))
    assert number == 5 and recorded == [("stream of", torch.device("cpu"))]


def asked(name: str) -> dict[str, Any]:
    shifted = labels().roll(-1, 1)
    shifted[:, -1] = -100
    return {
        "number": {"num_items_in_batch": 11},
        "tensor": {"num_items_in_batch": torch.tensor(11)},
        "aux": {"output_router_logits": True},
        "aux and number": {"output_router_logits": True, "num_items_in_batch": 11},
    }[name]


@pytest.mark.parametrize("name", ["number", "tensor", "aux", "aux and number"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_what_transformers_passes_on_means_the_same(name: str, family: str) -> None:
    model = exact(family)
    assert_equal(trained(fast(model), **asked(name)), trained(model, **asked(name)))


def test_aux_loss_by_the_config() -> None:
    model = exact("olmoe", output_router_logits=True, router_aux_loss_coef=0.5)
    ours = fast(model)
    assert_equal(trained(ours), trained(model))
    out = ours(input_ids=ids(), labels=ids())
    assert out.aux_loss > 0 and len(out.router_logits) == 2


def test_shifted_labels_and_another_ignored_number() -> None:
    model = stock("qwen3_moe", torch.float32).train()
    ours = fast(model)
    shifted = torch.roll(ids(), -2, 1)
    shifted[:, -2:] = 7
    kwargs = {"shift_labels": shifted, "ignore_index": 7}
    want, got = trained(model, **kwargs), trained(ours, **kwargs)
    assert_equal(got, want, bound=2e-5)
    assert abs(trained(ours)["loss"] - got["loss"]) > 1e-4


def test_tied_embeddings_and_frozen_parts() -> None:
    model = exact("qwen3_moe", tie_word_embeddings=True)
    ours = fast(model)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_equal(trained(ours), trained(model))
    model = exact("qwen3_moe")
    for frozen in (model.lm_head, model.model):
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        assert_equal(trained(fast(model)), trained(model))


def test_a_head_with_bias() -> None:
    model = exact("qwen3_moe")
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB, dtype=torch.float64))
    got = trained(fast(model))
    assert "lm_head.bias" in got
    assert_equal(got, trained(model))


def test_accumulates_over_micro_batches_as_stock_does() -> None:
    model = exact("qwen3_moe")
    ours = fast(model)
    for each in (model, ours):
        for row in range(2):
            part = {"input_ids": ids()[row : row + 1], "labels": labels()[row : row + 1]}
            (0.5 * each(**part, num_items_in_batch=torch.tensor(17)).loss).backward()
    assert_equal(gradients(ours), gradients(model))


def test_a_tuple_is_returned_where_it_is_asked_for() -> None:
    model = stock("qwen3_moe").train()
    want = speed_up(model).model(input_ids=ids(), labels=ids(), use_cache=False)
    out = model(input_ids=ids(), labels=ids(), use_cache=False, return_dict=False)
    assert isinstance(out, tuple) and len(out) == 1
    assert torch.equal(out[0], want.loss)
    assert want.to_tuple()[0] is want.loss


def test_positional_arguments() -> None:
    model = stock("qwen3_moe").train()
    ours = fast(model)
    named = ours(input_ids=ids(), labels=labels())
    placed = ours(ids(), None, None, None, None, labels())
    assert placed.logits is None and torch.equal(placed.loss, named.loss)
    every = (ids(), None, None, None, None, labels(), False, True)
    assert torch.equal(ours(*every).logits, model(*every).logits)


@pytest.mark.parametrize("why", ["eval", "logits_to_keep", "loss_function", "fp16", "no labels"])
def test_where_ours_cannot_stand_in_stock_runs(why: str) -> None:
    model = stock("qwen3_moe", torch.float32).train()
    kwargs: dict[str, Any] = {"input_ids": ids(), "labels": labels()}
    if why == "eval":
        model.eval()
    elif why == "logits_to_keep":
        kwargs["logits_to_keep"] = ids().shape[1]
    elif why == "loss_function":
        model.loss_function = lambda logits, *_, **__: logits.square().mean()
    elif why == "fp16":
        model.half()
    else:
        del kwargs["labels"]
    step = speed_up(model, rope=False)
    ours = model(**kwargs)
    step.restore()
    theirs = model(**kwargs)
    assert_bitwise({"logits": ours.logits}, {"logits": theirs.logits})
    if why != "no labels":
        assert torch.equal(ours.loss, theirs.loss)
    assert (ours.loss is None) == (theirs.loss is None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "loss_function", F.cross_entropy), "loss_function is not ForCausal"),
        (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "lm_head is wrapped, sharded"),
        (lambda m: m.half(), "fp16 gradients need the loss scale"),
        (lambda m: setattr(m, "vocab_size", 95), "lm_head has 96 rows, the vocabulary 95"),
    ],
)
def test_explain_says_why_the_loss_is_stock(change: Any, reason: str) -> None:
    model = stock("qwen3_moe", torch.float32).train()
    step = speed_up(model)
    change(model)
    assert reason in " ".join(step.explain().split())
