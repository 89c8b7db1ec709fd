"""A bank with a loop of its own: biases inside the product or behind it, tokens right and wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moetk
from moetk.routers import MixtralRouter


class Loop(moetk.ExpertBank):
    """A loop over experts. shift: how far beside its own an expert's up bias lies."""

    def __init__(self, inside: bool, shift: int = 0) -> None:
        super().__init__(hidden_size=16, num_experts=4, intermediate_size=24, bias=True)
        self.inside, self.shift = inside, shift

    def _times(self, x_NA: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x_NA, weight, bias) if self.inside else F.linear(x_NA, weight) + bias

    def forward(self, x_TH: Tensor, routing: moetk.TokenChoice) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        for e in range(4):
            tokens, columns = torch.where(routing.experts_TK == e)
            up_bias = self.gate_up_proj_bias[(e - self.shift) % 4]
            hidden = self._times(x_TH[tokens], self.gate_up_proj[e], up_bias)
            out = self._times(self.spec.activate(hidden), self.down_proj[e], self.down_proj_bias[e])
            y_TH = y_TH.index_add(0, tokens, out * routing.weights_TK[tokens, columns, None])
        return y_TH


def layers(theirs: moetk.ExpertBank) -> tuple[moetk.MoELayer, moetk.MoELayer]:
    torch.manual_seed(0)
    plain = moetk.ExpertBank(hidden_size=16, num_experts=4, intermediate_size=24, bias=True)
    theirs.load_state_dict(plain.state_dict())
    router = MixtralRouter(16, 4, 2)
    return moetk.MoELayer(router, plain), moetk.MoELayer(router, theirs)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "behind"])
def test_a_bias_is_heard_apart_from_its_product(inside: bool) -> None:
    report = moetk.compare(*layers(Loop(inside)), torch.randn(2, 12, 16))
    assert report.ok
    assert {"up", "activation", "expert_output"} <= {row.stage for row in report.rows}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "behind"])
def test_the_bias_of_another_expert_shows_where_it_acts(inside: bool) -> None:
    """`up` is the product before its bias: the first value with a wrong one is the activation."""
    report = moetk.compare(*layers(Loop(inside, shift=1)), torch.randn(2, 12, 16))
    assert report.first is not None and report.first.stage == "activation"
    assert report.cause is not None and str(report.cause) == "up bias of another expert"


class OtherTokens(moetk.ExpertBank):
    """Its experts read `tokens(t, k)`, which should be t."""

    def __init__(self, right: bool) -> None:
        super().__init__(hidden_size=16, num_experts=4, intermediate_size=24)
        self.right = right

    def forward(self, x_TH: Tensor, routing: moetk.TokenChoice) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        num_tokens, k = routing.experts_TK.shape
        for e in range(4):
            tokens, columns = torch.where(routing.experts_TK == e)
            read = tokens if self.right else (tokens * k + columns) % num_tokens  # x.repeat(k, 1)
            hidden = F.linear(x_TH[read], self.gate_up_proj[e])
            out = F.linear(self.spec.activate(hidden), self.down_proj[e])
            y_TH = y_TH.index_add(0, tokens, out * routing.weights_TK[tokens, columns, None])
        return y_TH


@pytest.mark.parametrize("right", [True, False])
def test_experts_that_read_other_tokens_differ_from_their_first_product_on(right: bool) -> None:
    torch.manual_seed(1)
    plain = moetk.ExpertBank(hidden_size=16, num_experts=4, intermediate_size=24)
    theirs = OtherTokens(right)
    theirs.load_state_dict(plain.state_dict())
    router = MixtralRouter(16, 4, 2)
    a, b = moetk.MoELayer(router, plain), moetk.MoELayer(router, theirs)
    report = moetk.compare(a, b, torch.randn(2, 12, 16))
    assert report.ok == right
    assert right or (report.first is not None and report.first.stage == "up")
