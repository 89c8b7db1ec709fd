"""What can be overheard of experts that compute in their own ways, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.sides.rows import choices_of_rows
from moetk.equivalence.trace import Trace, observe
from moetk.errors import EquivalenceError

T, E, K, H, I = 10, 4, 2, 6, 3


class Gate(nn.Module):
    """Best two of a softmax; every third token names its best expert twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x_TH, self.weight)
        weights, ids = logits.softmax(-1).topk(K)
        return logits, weights, ids


class Table(nn.Module):
    """Ids from a table that names experts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self.register_buffer("table", torch.tensor([[0, 0], [1, 2], [3, 1]]))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x_TH, self.weight)
        ids = self.table[torch.arange(len(x_TH)) % 3]
        return logits, logits.sigmoid().gather(1, ids), ids


class Experts(nn.Module):
    """As transformers' eager loop: rows slot by slot."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, I))

    def rows(self, ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        slot, token = (expert == ids.T).nonzero(as_tuple=True)
        return token, slot

    def up(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.gate_up_proj[expert])

    def one(self, x: Tensor, weight: Tensor, expert: int) -> Tensor:
        gate, up = self.up(x, expert).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj[expert]) * weight

    def forward(self, x_TH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        for expert in range(E):
            token, slot = self.rows(ids, expert)
            weight = weights[token, slot][:, None]
            y_TH = y_TH.index_add(0, token, self.one(x_TH[token], weight, expert))
        return y_TH


class ByToken(Experts):
    def rows(self, ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        return (ids == expert).nonzero(as_tuple=True)  # type: ignore[return-value]


class Backwards(Experts):
    def rows(self, ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        token, slot = super().rows(ids, expert)
        return token.flip(0), slot.flip(0)


class Dense(Experts):
    """Every expert on every token."""

    def forward(self, x_TH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        share_TE = torch.zeros(len(x_TH), E).scatter_add(1, ids, weights)
        return sum(self.one(x_TH, share_TE[:, [e]], e) for e in range(E))  # type: ignore[return-value]


class WritesWeights(Experts):
    """One of two equal ids is lost: a scatter where a scatter_add belongs."""

    def forward(self, x_TH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        share_TE = torch.zeros(len(x_TH), E).scatter(1, ids, weights)
        y_TH = torch.zeros_like(x_TH)
        for expert in range(E):
            token = (ids == expert).any(-1).nonzero()[:, 0]
            part = self.one(x_TH[token], share_TE[token, expert][:, None], expert)
            y_TH = y_TH.index_add(0, token, part)
        return y_TH


class WeighsFirst(Experts):
    def one(self, x: Tensor, weight: Tensor, expert: int) -> Tensor:
        gate, up = self.up(x, expert).chunk(2, -1)
        return F.linear(F.silu(gate) * up * weight, self.down_proj[expert])


class Normed(Experts):
    def up(self, x: Tensor, expert: int) -> Tensor:
        return super().up(F.normalize(x), expert)


class InHalves(Experts):
    def up(self, x: Tensor, expert: int) -> Tensor:
        return torch.cat([F.linear(x, half) for half in self.gate_up_proj[expert].chunk(2)], -1)


class OfCopies(Experts):
    def up(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.gate_up_proj[expert].clone())


class Block(nn.Module):
    def __init__(self, experts: type[Experts], gate: type[nn.Module] = Gate) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = gate(), experts()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TH = hidden_states.flatten(0, 1)
        _, weights, ids = self.gate(x_TH)
        return self.experts(x_TH, ids, weights).view_as(hidden_states)


def batch() -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(1))


def seen(block: Block, x_TH: Tensor | None = None, **given: Tensor) -> Trace:
    x_TH = batch() if x_TH is None else x_TH
    return observe(side_of(block, x_TH), x_TH, given=given)


@pytest.mark.parametrize("experts", [ByToken, Backwards, Dense])
def test_the_order_of_rows_is_the_codes_own_affair(experts: type[Experts]) -> None:
    want, mine = seen(Block(Experts)), seen(Block(experts))
    assert set(mine.values) >= set(want.values) - {"expert_output"}
    for held, kept in ((mine.values, want.values), (mine.grads, want.grads)):
        for name in held:
            assert torch.allclose(held[name], kept[name], atol=1e-5), name
    x_TH, ids = batch(), want.values["indices"]
    up = torch.einsum("th,tkjh->tkj", x_TH, Block(Experts).experts.gate_up_proj[ids])
    assert torch.allclose(want.values["up"], up, atol=1e-6)


def test_tokens_that_no_value_tells_apart() -> None:
    """Values would be right in any order; gradients would not."""
    x_TH, ids = batch(), torch.tensor([[0, 1], [1, 0], *[[2, 3]] * (T - 2)])
    x_TH[1] = x_TH[0]
    assert "up" not in seen(Block(Experts), x_TH, indices=ids).values
    ids[1] = ids[0]
    assert "up" in seen(Block(Experts), x_TH, indices=ids).values  # one order fits both rules
    assert "up" not in seen(Block(Backwards), x_TH, indices=ids).values


def test_one_of_two_equal_ids_dropped_is_not_dispatched() -> None:
    want, mine = seen(Block(Experts, Table)), seen(Block(WritesWeights, Table))
    assert want.values["dispatched"].all()
    lost = ~mine.values["dispatched"]
    assert torch.equal(lost.nonzero(), torch.tensor([[t, 1] for t in range(0, T, 3)]))
    assert not mine.values["up"][lost].any()


def test_weights_before_the_second_product_hide_what_they_are_in() -> None:
    mine, want = seen(Block(WeighsFirst)), seen(Block(Experts))
    assert set(want.values) - set(mine.values) == {"activation", "expert_output"}
    assert torch.allclose(mine.values["combined"], want.values["combined"], atol=1e-6)
    # Judged by the weights that the experts got, not by the gate's own.
    given = {"indices": want.values["indices"], "weights": torch.full((T, K), 7.0)}
    assert "expert_output" in seen(Block(Experts), **given).values
    assert "expert_output" not in seen(Block(WeighsFirst), **given).values


@pytest.mark.parametrize("experts", [Normed, InHalves, OfCopies])
def test_what_is_not_certain_is_left_out(experts: type[Experts]) -> None:
    mine, want = seen(Block(experts)), seen(Block(Experts))
    assert set(want.values) - set(mine.values) == {"up", "activation", "expert_output"}
    assert mine.values["dispatched"].all()


def test_a_table_is_forced_too() -> None:
    ids = torch.tensor([[2, 1]] * T)
    trace = seen(Block(Experts, Table), indices=ids)
    assert torch.equal(trace.values["counts"], torch.tensor([0, T, T, 0]))
    assert torch.equal(trace.values["indices"][0], torch.tensor([0, 0]))
    assert torch.equal(trace.values["weights"], trace.values["scores"].gather(1, ids))


def test_no_token_at_all() -> None:
    trace = seen(Block(Experts), torch.zeros(0, H))
    assert trace.values["up"].shape == (0, K, 2 * I) and not trace.values["counts"].any()


def test_every_expert_for_every_token() -> None:
    class All(Gate):
        def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(x_TH, self.weight)
            weights, ids = logits.softmax(-1).topk(E)
            return logits, weights, ids

    trace = seen(Block(Experts, All))
    assert torch.allclose(trace.values["logits"], F.linear(batch(), Block(Experts).gate.weight))
    assert torch.equal(trace.values["weights"], trace.values["scores"].sort(-1, True).values)


def test_a_block_that_compare_cannot_read() -> None:
    class Hidden(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    class Twice(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(super().forward(hidden_states))

    class Asks(Block):
        def forward(self, hidden_states: Tensor, speed: float) -> Tensor:  # type: ignore[override]
            return super().forward(hidden_states)

    for block, why in (
        (Hidden(Experts), "Hidden never called its experts"),
        (Twice(Experts), "Twice calls its experts more than once"),
        (Asks(Experts), "Asks.forward needs speed, which compare does not know"),
    ):
        with pytest.raises(EquivalenceError, match=why):
            seen(block)


def inputs_of(x_TH: Tensor, k: int) -> Any:
    return lambda choices_C: x_TH[choices_C // k]


def test_rows_by_place_and_by_value() -> None:
    x_TH = batch()
    choices = torch.tensor([0, 3, 4, 9])  # tokens 0, 1, 2, 4 of two slots each

    def found(rows: list[int], declared: Any = None) -> list[int] | None:
        parts = [(x_TH[rows], choices)]
        result = choices_of_rows(parts, K, inputs_of(x_TH, K), declared)
        return None if result is None else result[0].tolist()

    assert found([0, 1, 2, 4]) == [0, 3, 4, 9]
    assert found([0, 2, 1, 4]) == [0, 4, 3, 9]  # slot by slot
    assert found([4, 2, 0, 1]) == [9, 4, 0, 3]
    assert found([4, 2]) == [9, 4]  # two were dropped
    assert found([7, 4, 2, 0, 1]) == [-1, 9, 4, 0, 3]  # one that nobody asked for
    assert found([7, 4, 2, 0]) is None
    assert found([]) == []
    x_TH[2] = x_TH[1]
    assert found([0, 1, 2, 4]) is None
    assert found([0, 1, 2, 4], "token") == [0, 3, 4, 9]
    assert found([0, 1, 2, 4], "slot") == [0, 4, 3, 9]
    assert found([4, 0, 1, 2], "token") is None
    x_TH[2] = torch.nan
    assert found([0, 1, 2, 4]) == [0, 3, 4, 9]
