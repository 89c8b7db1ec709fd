"""The Triton kernels of the fused bank against their torch twins, in Triton's interpreter.

The interpreter is chosen where Triton is first imported, so this file runs itself in a process of
its own. It is trusted with float32 and whole numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.equivalence.judge import judge
from moetk.experts import (
    Activation,
    BankSpec,
    BankWeights,
    ClampedGated,
    Gated,
    GptOssGated,
    Plain,
)
from moetk.experts.fused import fused
from moetk.experts.reference import reference
from moetk.kernels import fused_mlp as twin
from moetk.kernels.grouped_mm import grouped_mm, grouped_outer
from moetk.routing import TokenChoice
from tests.banks import gradients, make_weights
from tests.interpreted import outcomes_of, tell

gelu_tanh = partial(F.gelu, approximate="tanh")
# Each activation once, and each pair of layouts and biases with some activation.
ONE_OF_EACH: list[tuple[Activation, bool, bool, bool]] = [  # transposed, interleaved, bias
    (Gated(), False, False, False),
    (Gated(), True, False, True),
    (Gated(F.gelu), False, True, True),
    (Gated(gelu_tanh), True, True, False),
    (Gated(F.relu), False, False, True),
    (ClampedGated(0.4), True, False, False),
    (GptOssGated(1.7, 0.5), True, True, True),
    (GptOssGated(1.7, 0.5), False, False, False),
    (Plain(), False, False, True),
    (Plain(F.gelu), True, False, False),
]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.5


def a_routing(tokens: int, experts: int, k: int, drops: bool) -> TokenChoice:
    ids_TK = torch.rand(tokens, experts).argsort(-1)[:, :k]
    weights_TK, kept_TK = torch.rand(tokens, k), None
    if drops:
        kept_TK = torch.rand(tokens, k) < 0.7
        ids_TK[:1] = -1
        weights_TK = weights_TK.masked_fill(~kept_TK | (ids_TK < 0), 0)
    return TokenChoice(ids_TK, weights_TK.requires_grad_(), experts, kept_TK=kept_TK)


@contextmanager
def on_kernels() -> Iterator[None]:
    """`fused` calls the kernels, interpreted, as it does in eager CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "direct", lambda tensor: True)
        yield


def raised(value: Any) -> Any:
    """The same numbers in float64."""
    changes = {
        name: t.detach().double().requires_grad_()
        for name, t in vars(value).items()
        if isinstance(t, Tensor) and t.is_floating_point()
    }
    return replace(value, **changes)


def agree(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: TokenChoice) -> None:
    """Kernels against the twin under the pass rule: values and every gradient."""
    with on_kernels():
        ours = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
    eager = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
    x_exact = x_TH.detach().double().requires_grad_()
    exact = raised(weights), x_exact, raised(routing)
    truth = gradients(reference(spec, *exact), *exact)
    assert ours.keys() == truth.keys()
    terms = 4 * max(spec.up_width, spec.hidden_size, len(x_TH))
    for name, tensor in truth.items():
        assert ours[name].dtype == eager[name].dtype, name
        verdict = judge(name, ours[name], eager[name], tensor, reduction=terms)
        assert verdict.ok, verdict


def a_layer(activation: Activation, transposed: bool, interleaved: bool, bias: bool) -> None:
    """Sizes that no tile divides; rows that nobody computes hold what memory held."""
    torch.manual_seed(0)
    spec = BankSpec(3, 20, 12, activation, transposed=transposed, interleaved=interleaved)
    weights = make_weights(spec, bias, torch.float32)
    agree(spec, weights, normal(7, 20).requires_grad_(), a_routing(7, 3, 2, True))


def many_tiles() -> None:
    """Several tiles along every width, whole ones and a rest; experts with many rows."""
    torch.manual_seed(0)
    spec = BankSpec(2, 136, 72, GptOssGated(1.7, 0.5), transposed=True, interleaved=True)
    for spec_ in (spec, BankSpec(2, 128, 64)):
        weights = make_weights(spec_, False, torch.float32)
        agree(
            spec_,
            weights,
            normal(40, spec_.hidden_size).requires_grad_(),
            a_routing(40, 2, 2, False),
        )


def few_tokens() -> None:
    torch.manual_seed(0)
    spec = BankSpec(3, 20, 12)
    weights = make_weights(spec, True, torch.float32)
    for tokens, k in ((0, 2), (1, 1), (2, 3)):
        agree(spec, weights, normal(tokens, 20).requires_grad_(), a_routing(tokens, 3, k, False))


def nothing_kept() -> None:
    """Without a backward the up product is not written, and the output is the same."""
    torch.manual_seed(0)
    spec, routing = BankSpec(3, 20, 12), a_routing(7, 3, 2, True)
    weights, x_TH = make_weights(spec, True, torch.float32), normal(7, 20)
    with on_kernels():
        kept_TH = fused(spec, weights, x_TH, routing).detach()
        with torch.no_grad():
            assert torch.equal(fused(spec, weights, x_TH, routing), kept_TH)


def a_row_of_nan() -> None:
    """Every other token's output and gradients are bitwise what they were."""
    torch.manual_seed(0)
    spec, routing = BankSpec(3, 20, 12, ClampedGated(0.4)), a_routing(9, 3, 2, True)
    weights, x_TH = make_weights(spec, True, torch.float32), normal(9, 20)
    found, others = [], torch.arange(9) != 4
    for value in (1.0, float("nan")):
        x_TH = x_TH.clone()
        x_TH[[0, 4]] = value  # nobody computes token 0
        x_TH.requires_grad_()
        with on_kernels():
            y_TH = fused(spec, weights, x_TH, routing)
            grads = torch.autograd.grad(y_TH[others].sum(), (x_TH, routing.weights_TK))
        found.append((y_TH.detach(), *grads))
        x_TH = x_TH.detach()
    for clean, spoiled in zip(*found, strict=True):
        assert torch.equal(clean[others], spoiled[others])
    assert found[1][0][4].isnan().all() and (found[1][0][0] == 0).all()


def what_lies_beside() -> None:
    """An expert's NaN stays its own where the reduction ends within a tile, and the weight of a
    choice that nobody computes may be NaN."""
    torch.manual_seed(0)
    for transposed in (False, True):
        spec = BankSpec(2, 20, 12, transposed=transposed)
        weights, x_TH = make_weights(spec, False, torch.float32), normal(6, 20).requires_grad_()
        for matrix in (weights.up, weights.down):
            matrix.data[1] = float("nan")
        weights_TK = torch.tensor([[0.7, float("nan")]] * 6)
        routing = TokenChoice(torch.tensor([[0, -1]] * 6), weights_TK, 2)
        with on_kernels():
            y_TH = fused(spec, weights, x_TH, routing)
            (dx_TH,) = torch.autograd.grad(y_TH.sum(), x_TH)
        near(y_TH.detach(), reference(spec, weights, x_TH, routing).detach())
        assert dx_TH.isfinite().all()


def views() -> None:
    """Tensors with other strides are what they show; the gradient of a sum has stride 0."""
    torch.manual_seed(0)
    spec, routing = BankSpec(3, 20, 12), a_routing(7, 3, 2, True)
    weights, x_TH = make_weights(spec, True, torch.float32), normal(7, 20).requires_grad_()

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), float("nan"))
        wide[..., 0] = tensor.detach()
        return wide[..., 0].requires_grad_()

    held = {name: strided(t) for name, t in vars(weights).items() if isinstance(t, Tensor)}
    others = replace(weights, **held), strided(x_TH)
    viewed_by = replace(routing, weights_TK=strided(routing.weights_TK))
    with on_kernels():
        want = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
        found = gradients(fused(spec, *others, viewed_by), *others, viewed_by)
        for name, tensor in want.items():
            near(found[name], tensor)
        (summed_TH,) = torch.autograd.grad(fused(spec, weights, x_TH, routing).sum(), x_TH)
        ones = torch.autograd.grad(fused(spec, weights, x_TH, routing), x_TH, torch.ones(7, 20))
        assert torch.equal(summed_TH, ones[0])


def one_gradient_alone() -> None:
    torch.manual_seed(0)
    spec, routing = BankSpec(3, 20, 12), a_routing(7, 3, 2, True)
    weights, x_TH = make_weights(spec, True, torch.float32), normal(7, 20).requires_grad_()
    leaves = {"x": x_TH, "weights_TK": routing.weights_TK, **vars(weights)}
    leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    with on_kernels():
        want = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
        cotangent = torch.randn(
            (7, 20), generator=torch.Generator().manual_seed(3), dtype=torch.float64
        ).float()
        for trained in leaves:
            for name, leaf in leaves.items():
                leaf.requires_grad_(name == trained)
            y_TH = fused(spec, weights, x_TH, routing)
            (found,) = torch.autograd.grad(y_TH, leaves[trained], cotangent)
            assert torch.equal(found, want[trained]), trained


def added_gradients(transposed: bool) -> None:
    """The first backward makes .grad, the next adds to it in place."""
    torch.manual_seed(0)
    spec, routing = BankSpec(3, 20, 12, transposed=transposed), a_routing(7, 3, 2, True)
    weights, x_TH = make_weights(spec, False, torch.float32), normal(7, 20)
    matrices = (weights.up, weights.down)
    want, made = [torch.zeros_like(matrix) for matrix in matrices], []
    with on_kernels():
        for step in (1, 2):
            returned = torch.autograd.grad(
                fused(spec, weights, step * x_TH, routing).sum(), matrices
            )
            want = [total + grad for total, grad in zip(want, returned, strict=True)]
            adds = replace(weights, add_to_grad=True)
            fused(spec, adds, step * x_TH, routing).sum().backward()
            made.append([matrix.grad for matrix in matrices])
    for first, second, total in zip(*made, want, strict=True):
        assert second is first
        near(second, total)


# One product at a time.

COUNTS = {
    "one row each": [1, 1, 1, 1],
    "all at one": [0, 37, 0],
    "empty first": [0, 0, 5, 17],
    "empty between": [16, 0, 33],
    "empty last": [15, 2, 0],
    "all but one of a tile": [17, 15],
    "whole tiles": [16, 32],
    "nobody": [0, 0],
}
NOBODYS = 3  # rows behind the last offset


def products(counts: list[int], a: int, b: int) -> None:
    """Each product alone over these segments, with NaN wherever it has no business."""
    from moetk.kernels.gpu.combine import segment_sum
    from moetk.kernels.gpu.outer import outer
    from moetk.kernels.gpu.rows import rows_times
    from moetk.kernels.gpu.tiles import Tile

    torch.manual_seed(0)
    offsets_E, used = torch.tensor(counts).cumsum(0).int(), sum(counts)
    x_TA, other_NB = normal(used + 4, a), normal(used + NOBODYS, b)
    x_TA[-1], other_NB[used:] = float("nan"), float("nan")
    source_N = torch.cat([torch.randperm(used + 3)[:used], torch.full((NOBODYS,), used + 3)]).int()
    rows_NA, bias_EB = x_TA[source_N.long()], normal(len(counts), b)
    weights_EAB = normal(len(counts), a, b)
    clean_NA, clean_NB = rows_NA.clone(), other_NB.clone()
    clean_NA[used:], clean_NB[used:] = 0, 0

    want_NB = grouped_mm(clean_NA, weights_EAB, offsets_E)[:used]
    want_NB = want_NB + twin.bias_rows(bias_EB, offsets_E, used)
    want_EAB = grouped_outer(clean_NA, clean_NB, offsets_E)
    for tile, first in (
        (Tile(16, 16, 16, 4, 2, group=2), False),
        (Tile(32, 16, 16, 4, 2, group=1, per_sm=2, tail=16), True),
        (Tile(16, 16, 16, 4, 2, per_sm=1), False),
        (Tile(16, 16, 16, 4, 2, reduces=1), False),
    ):
        held = weights_EAB.transpose(1, 2).contiguous() if first else weights_EAB
        how = {"columns_first": first, "bias_EB": bias_EB, "tile": tile}
        for found_NB in (
            rows_times("down", rows_NA, held, offsets_E, **how),
            rows_times("down", x_TA, held, offsets_E, source_N=source_N, **how),
        ):
            near(found_NB[:used], want_NB)
            assert found_NB[used:].isnan().all()  # as poisoned memory was: nothing wrote there
        gathered = {"tile": tile, "source_N": source_N}
        for left, right, options, want in (
            (rows_NA, other_NB, {"tile": tile}, want_EAB),
            (x_TA, other_NB, {"gather": "left", **gathered}, want_EAB),
            (other_NB, x_TA, {"gather": "right", **gathered}, want_EAB.transpose(1, 2)),
        ):
            near(outer("dup", left, right, offsets_E, **options), want)
            into = torch.ones_like(want, memory_format=torch.contiguous_format)
            assert outer("dup", left, right, offsets_E, into_EAB=into, **options) is into
            near(into, want + 1)
    near(segment_sum(other_NB, offsets_E), twin.segment_sum(clean_NB, offsets_E))


def a_sum_that_is_rounded_before_it_is_added() -> None:
    """What the copy engine adds in L2, to the bit; a tile that would reach into the next expert's
    matrix is added with one rounding as ever."""
    from moetk.kernels.gpu.outer import outer
    from moetk.kernels.gpu.tiles import Tile

    torch.manual_seed(0)
    offsets_E, tile = torch.tensor([9, 9, 24]).int(), Tile(16, 16, 16, 4, 2, reduces=1)
    for a, rounds in ((32, True), (24, False)):
        left, right = normal(24, a).half(), normal(24, 24).half()
        before = (normal(3, a, 24) * 3).half()
        exact = grouped_outer(left.float(), right.float(), offsets_E)
        found = outer("dup", left, right, offsets_E, into_EAB=before.clone(), tile=tile)
        once = (before.float() + exact).half()
        twice = (before.float() + exact.half().float()).half()
        assert not torch.equal(once, twice)
        assert torch.equal(found, twice if rounds else once)


def last_rows_of_up(counts: list[int]) -> None:
    """The up product with a smaller tile for an expert's last rows, in both layouts of gate and
    up; NaN where it has no business."""
    from moetk.kernels.form import Form
    from moetk.kernels.gpu.tiles import Tile
    from moetk.kernels.gpu.up import up_activate

    torch.manual_seed(0)
    offsets_E, used = torch.tensor(counts).cumsum(0).int(), sum(counts)
    x_TH = normal(used + 4, 20)
    x_TH[-1] = float("nan")
    source_N = torch.cat([torch.randperm(used + 3)[:used], torch.full((NOBODYS,), used + 3)]).int()
    up, bias_EJ = normal(len(counts), 48, 20), normal(len(counts), 48)
    rows_NH = x_TH[source_N.long()].clone()
    rows_NH[used:] = 0
    for form in (Form(), Form(interleaved=True), Form("gelu", gated=False)):
        want_NJ = grouped_mm(rows_NH, form.columns(up), offsets_E)[:used]
        want_NJ = want_NJ + twin.bias_rows(bias_EJ, offsets_E, used)
        for tile in (Tile(32, 16, 16, 4, 2, tail=16), Tile(32, 32, 16, 4, 2, group=1, tail=16)):
            h_NJ, a_NI = up_activate(
                x_TH, source_N, up, bias_EJ, offsets_E, form, keep=True, tile=tile
            )
            near(h_NJ[:used], want_NJ)
            near(a_NI[:used], form.activate(want_NJ))
            assert h_NJ[used:].isnan().all() and a_NI[used:].isnan().all()


def near(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


# The table of tiles.

SHARED_MEMORY = 227 * 1024  # bytes that one program may have on Hopper


def the_table_of_tiles() -> None:
    from moetk.bench.tiles import tiles_to_try
    from moetk.kernels.gpu.tiles import tile_for, tile_table

    for kernel, entries in tile_table().items():
        for rows_, columns, reduction, tile in entries:
            assert rows_ >= 1 and columns >= 1 and reduction >= 1
            assert tile in tiles_to_try(kernel, rows_), (kernel, rows_, tile)  # or none is tuned
            for size in (tile.m, tile.n, tile.k):
                assert size >= 16 and size & (size - 1) == 0, (kernel, tile)
            assert tile.warps in (4, 8) and tile.stages >= 1 and tile.group >= 1
            right = tile.k * tile.n * (2 if kernel == "up" else 1)  # gate and up side by side
            staged = tile.m * tile.k + right
            if tile.per_sm and kernel.startswith("d") and "_" in kernel:  # a walk along the sum
                staged = right + tile.m * tile.n
            assert staged * 2 * tile.stages <= SHARED_MEMORY, (kernel, tile)
        tiles = {tile for *_, tile in entries}
        for experts in (1, 2, 7, 128, 1000, 1024):
            for power in range(0, 21, 4):
                assert tile_for(kernel, 2**power, experts, 768, 2048) in tiles
                assert tile_for(kernel, 2**power + 1, experts, 8, 14336) in tiles


def the_kernels_of_the_table() -> None:
    """The table knows every product that a layer runs, and no other."""
    from moetk.kernels.gpu import mlp, outer, rows, up
    from moetk.kernels.gpu.tiles import tile_for, tile_table

    asked: set[str] = set()

    def note(kernel: str, *args: int) -> Any:
        asked.add(kernel)
        return tile_for(kernel, *args)

    torch.manual_seed(0)
    spec = BankSpec(2, 8, 8)
    weights, x_TH = make_weights(spec, False, torch.float32), normal(3, 8).requires_grad_()
    weights = replace(weights, add_to_grad=True)
    with pytest.MonkeyPatch.context() as patch, on_kernels():
        for room in (up, rows, outer):
            patch.setattr(room, "tile_for", note)
        for copy_from in (0, 64):
            patch.setattr(mlp, "COPY_FROM", copy_from)
            weights.up.grad = None
            for _ in range(2):  # .grad is made, then added to
                fused(spec, weights, x_TH, a_routing(3, 2, 2, False)).sum().backward()
    assert asked == set(tile_table())


CASES: dict[str, Callable[[], None]] = {
    **{
        f"layer: {type(a).__name__} {i}": partial(a_layer, a, *layout)
        for i, (a, *layout) in enumerate(ONE_OF_EACH)
    },
    "layer: many tiles": many_tiles,
    "layer: few tokens": few_tokens,
    "layer: nothing kept": nothing_kept,
    "layer: a row of NaN": a_row_of_nan,
    "layer: what lies beside": what_lies_beside,
    "layer: views": views,
    "layer: one gradient alone": one_gradient_alone,
    "layer: added gradients": partial(added_gradients, False),
    "layer: added gradients, transposed": partial(added_gradients, True),
    **{f"products: {name}": partial(products, counts, 20, 24) for name, counts in COUNTS.items()},
    **{
        f"products: {name}, whole tiles wide": partial(products, COUNTS[name], 32, 48)
        for name in ("all at one", "empty between", "nobody")
    },
    "products: rounded, then added": a_sum_that_is_rounded_before_it_is_added,
    **{
        f"up: {name}": partial(last_rows_of_up, COUNTS[name])
        for name in ("all at one", "empty between", "all but one of a tile")
    },
    "tiles": the_table_of_tiles,
    "tiles: kernels": the_kernels_of_the_table,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_its_twin(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]


if __name__ == "__main__":
    from tests.conftest import poisoned

    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]
    torch.empty_like = poisoned(torch.empty_like)
    tell(CASES)
