"""A bank around a bank: nothing inside is its own, and what it computes is a bank's."""

import pytest
import torch

from moetk import compare
from tests.equivalence.pairs import Chunked
from tests.equivalence.steps import bank, inputs, mixtral, routing


class Doubled(Chunked):
    def forward(self, x_TH, routing):
        return 2 * super().forward(x_TH, routing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_around_a_bank_is_compared_at_a_routing(dtype):
    right, wrapped = bank().to(dtype), Chunked(bank().to(dtype), 3)
    for a, b in ((right, wrapped), (wrapped, right)):
        report = compare(a, b, inputs().to(dtype), routing=routing())
        assert report.ok, report.table()
        assert {"combined", "grad weights", "grad x"} <= {row.stage for row in report.rows}


def test_what_it_adds_shows():
    report = compare(bank(), Doubled(bank(), 3), inputs(), routing=routing())
    assert report.first is not None and report.first.stage == "combined"
    assert report.cause == "scaled by a constant"


def test_without_a_routing_a_module_of_two_arguments_is_a_router():
    assert "logits" in {row.stage for row in compare(mixtral(), mixtral(), inputs()).rows}
