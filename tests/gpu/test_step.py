"""Norm, rotation and loss on the device, against fp64 and beside transformers' own code.

Letters: B sequences, S positions, N heads, D head width, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

from moetk.errors import SecondOrderError
from moetk.kernels.cross_entropy import linear_cross_entropy
from moetk.kernels.norm import added_rms_norm, forked_rms_norm, rms_norm
from moetk.kernels.rope import Norm, rotated
from moetk.layers.step import speed_up
from tests.gpu.device import DEVICE, KERNELS, needs_kernels, normal
from tests.gpu.judged import assert_bitwise, assert_passes, grown
from tests.tiny import tiny

BF16 = torch.bfloat16
LENGTH, VOCABULARY = (2048, 151_936) if KERNELS else (16, 500)
Leaves = dict[str, Tensor]


def run(
    compute: Callable[[Leaves], dict[str, Tensor]],
    leaves: Leaves,
    cotangents: list[Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    held = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in leaves.items()}
    return grown(held, compute(held), cotangents)


# Norms.


def stock_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        return (offset + weight) * normed.to(x.dtype)
    return ((offset + weight.to(wide)) * normed).to(x.dtype)


rules = pytest.mark.parametrize(
    ("offset", "rounds_first"), [(0.0, True), (0.0, False), (1.0, False)]
)
rows = pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, LENGTH, 2048), BF16), ((3, 5, 72), BF16), ((7, 2880), torch.float32), ((0, 64), BF16)],
    ids=["qwen3", "odd", "fp32", "none"],
)


@rules
@rows
def test_norm(shape, dtype, offset, rounds_first):
    leaves = {
        "x": normal(0, *shape, dtype=dtype),
        "weight": (1 - offset + normal(1, shape[-1], std=0.2)).to(dtype),
    }
    settings = {"offset": offset, "rounds_first": rounds_first}
    dy = normal(2, *shape)

    def ours(held: Leaves) -> dict[str, Tensor]:
        return {"y": rms_norm(held["x"], held["weight"], 1e-6, **settings)}

    def plain(held: Leaves) -> dict[str, Tensor]:
        return {"y": stock_norm(held["x"], held["weight"], 1e-6, offset, rounds_first)}

    found = run(ours, leaves, [dy])
    assert_bitwise(run(ours, leaves, [dy]), found)
    draw = (found, run(plain, leaves, [dy]), run(plain, leaves, [dy], torch.float64))
    assert_passes([draw], reduction=max(shape[-1], leaves["x"].numel() // shape[-1]))


@rules
@rows
@pytest.mark.parametrize("names", [("x",), ("x", "branch")], ids=["forked", "added"])
def test_norm_and_stream(shape, dtype, names, offset, rounds_first):
    leaves = {name: normal(n, *shape, dtype=dtype) for n, name in enumerate(names)}
    leaves["weight"] = (1 - offset + normal(2, shape[-1], std=0.2)).to(dtype)
    settings = {"offset": offset, "rounds_first": rounds_first}
    into = [normal(3, *shape), normal(4, *shape)]

    def ours(held: Leaves) -> dict[str, Tensor]:
        joined = added_rms_norm if "branch" in held else forked_rms_norm
        return dict(zip(("stream", "y"), joined(*held.values(), 1e-6, **settings), strict=True))

    def plain(held: Leaves) -> dict[str, Tensor]:
        stream = held["x"] + held["branch"] if "branch" in held else held["x"]
        return {"stream": stream, "y": stock_norm(stream, held["weight"], 1e-6, *settings.values())}

    found = run(ours, leaves, into)
    assert_bitwise(run(ours, leaves, into), found)
    if "branch" in names:
        assert torch.equal(found["dx"], found["dbranch"])
    assert torch.equal(found["stream"], sum(leaves[name] for name in names))
    draw = (found, run(plain, leaves, into), run(plain, leaves, into, torch.float64))
    assert_passes([draw], reduction=max(shape[-1], leaves["x"].numel() // shape[-1]))


@needs_kernels
def test_second_derivatives_beside_a_stream_are_refused():
    x, weight = normal(0, 3, 64).requires_grad_(), normal(1, 64)
    for made in (forked_rms_norm(x, weight, 1e-6), added_rms_norm(x, x, weight, 1e-6)):
        for y in made:
            with pytest.raises(SecondOrderError, match="ed_rms_norm: create_graph=True"):
                torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("names", [("x",), ("x", "branch")], ids=["forked", "added"])
def test_norm_and_stream_in_one_graph(names):
    leaves = {name: normal(n, 5, 72, dtype=BF16) for n, name in enumerate(names)}
    leaves["weight"] = normal(2, 72, dtype=BF16)

    def ours(held: Leaves) -> dict[str, Tensor]:
        joined = added_rms_norm if "branch" in held else forked_rms_norm
        inner = {**held, "x": held["x"] + 1}
        return dict(zip(("stream", "y"), joined(*inner.values(), 1e-6), strict=True))

    into = [normal(n, 5, 72) for n in (3, 4)]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_bitwise(run(compiled, leaves, into), run(ours, leaves, into))


# Norm and rotation of queries and keys.


def written_out(
    x_BSND: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, weight_W: Tensor | None
) -> Tensor:
    """By transformers' functions; the norm in fp64 where x is, which transformers' is not."""
    B, S, N, D = x_BSND.shape
    x = x_BSND
    if weight_W is not None:
        rows_W = x.reshape(B, S, N * D // len(weight_W), len(weight_W))
        if x.dtype == torch.float64:
            x = stock_norm(rows_W, weight_W, 1e-6, 0.0, True).view_as(x_BSND)
        else:
            module = Qwen3MoeRMSNorm(len(weight_W), eps=1e-6)
            del module.weight
            module.weight = weight_W  # a plain tensor: the gradient reaches the drawn one
            x = module(rows_W).view_as(x_BSND)
    x = x.transpose(1, 2)
    return apply_rotary_pos_emb(x, x, cos_BSD, sin_BSD)[0].transpose(1, 2)


@pytest.mark.parametrize("kind", ["none", "head", "row"])
@pytest.mark.parametrize(
    "shape",
    [(2, LENGTH, 32, 4, 128), (3, 5, 4, 2, 8), (1, 7, 3, 1, 6), (0, 3, 4, 2, 8)],
    ids=["qwen3", "small", "odd", "none"],
)
@pytest.mark.parametrize("shared", [True, False], ids=["shared tables", "own tables"])
def test_norm_and_rotation(shape, kind, shared):
    B, S, NQ, NK, D = shape
    leaves = {"q": normal(0, B, S, NQ, D, dtype=BF16), "k": normal(1, B, S, NK, D, dtype=BF16)}
    if kind != "none":
        for n, (name, heads) in enumerate((("q_norm", NQ), ("k_norm", NK))):
            width = D if kind == "head" else heads * D
            leaves[name] = (1 + normal(2 + n, width, std=0.2)).to(BF16)
    angles_BSD = normal(4, 1 if shared else B, S, D // 2).repeat(1, 1, 2) * 9
    cos, sin = angles_BSD.cos().to(BF16), angles_BSD.sin().to(BF16)
    # As attention hands gradients back: not contiguous.
    into = [normal(5 + n, B, N, S, D).transpose(1, 2) for n, N in enumerate((NQ, NK))]

    def ours(held: Leaves) -> dict[str, Tensor]:
        norms = [Norm(held[n], 1e-6) if n in held else None for n in ("q_norm", "k_norm")]
        q, k = rotated(held["q"], held["k"], cos, sin, *norms)
        return {"q_out": q, "k_out": k}

    def plain(held: Leaves) -> dict[str, Tensor]:
        return {
            f"{n}_out": written_out(
                held[n], cos.to(held[n].dtype), sin.to(held[n].dtype), held.get(f"{n}_norm")
            )
            for n in ("q", "k")
        }

    found = run(ours, leaves, into)
    assert_bitwise(run(ours, leaves, into), found)
    draw = (found, run(plain, leaves, into), run(plain, leaves, into, torch.float64))
    assert_passes([draw], reduction=max(B * S * max(NQ, NK), D * max(NQ, NK)))


# The loss.


@pytest.mark.large
@pytest.mark.parametrize("rows", ["all", "labelled"])
@pytest.mark.parametrize("accumulate", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_loss_of_a_real_vocabulary(rows, accumulate):
    """The chunks' sum of dW in bf16 is rounded once a chunk, as a plain sum over chunks is."""
    T, H, V, chunk = LENGTH, 2048 if KERNELS else 64, VOCABULARY, LENGTH // 2
    leaves = {"x": normal(0, T, H, dtype=BF16), "weight": normal(1, V, H, dtype=BF16, std=0.04)}
    source = torch.Generator(DEVICE).manual_seed(2)
    labels_T = torch.randint(V, (T,), device=DEVICE, generator=source)
    labels_T[:: T // 4] = -100
    labels_T[1], labels_T[2] = 0, V - 1
    items = (labels_T != -100).sum()
    rows_N = None
    if rows == "labelled":
        rows_N = (labels_T == -100).to(torch.int8).argsort(stable=True)[: T - 4]

    def ours(held: Leaves) -> dict[str, Tensor]:
        settings = {"rows_N": rows_N, "chunk": chunk, "accumulate": accumulate}
        return {"loss": linear_cross_entropy(*held.values(), labels_T, items, **settings)}

    def plain(held: Leaves) -> dict[str, Tensor]:
        logits_TV = F.linear(*held.values())
        wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return {"loss": F.cross_entropy(wide, labels_T, reduction="sum") / items}

    one = [torch.ones((), device=DEVICE)]
    found = run(ours, leaves, one)
    assert_bitwise(run(ours, leaves, one), found)
    assert not found["dx"][labels_T == -100].any()
    draw = (found, run(plain, leaves, one), run(plain, leaves, one, torch.float64))
    assert_passes([draw], reduction=max(H, V, T))


def test_no_loss_without_labels():
    leaves = {"x": normal(0, 40, 64, dtype=BF16), "weight": normal(1, 90, 64, dtype=BF16)}
    labels_T = torch.full((40,), -100, device=DEVICE)
    items = torch.ones((), device=DEVICE)
    found = run(
        lambda held: {"loss": linear_cross_entropy(*held.values(), labels_T, items)},
        leaves,
        [items],
    )
    assert not any(tensor.any() for tensor in found.values())


# The parts in a model.


def trained(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss"])
def test_a_sped_up_model_is_the_stock_one(family):
    """In fp32, and again when it is restored. (Stock's own sums on a GPU have no fixed order.)"""
    model = tiny(family).to(DEVICE).train()
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    truth = trained(copy.deepcopy(model).double(), ids)
    eager = trained(model, ids)
    step = speed_up(model)
    ours = trained(model, ids)
    step.restore()
    for found in (ours, trained(model, ids)):
        assert_passes([(found, eager, truth)], reduction=24 * 96)
