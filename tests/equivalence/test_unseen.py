"""What a comparison of one forward in evaluation cannot see, it says."""

import copy
from dataclasses import replace

import pytest
import torch

from moetk import ExpertBank, MoELayer, compare
from moetk.controllers import BiasUpdate
from moetk.dispatch import Capacity, Local
from moetk.losses import RouterZLoss
from moetk.routers import NoisyTopKRouter
from tests.equivalence.steps import GROUPED, V3, E, H, I, K, bank, inputs, router, routing, v3
from tests.layers.versions import block_of

SECOND = "returns something else on a second call than on the first, the other does not"
TRAINING = "returns something else in training than in evaluation, the other does not"


class Drifts(V3):
    def forward(self, x_TH, ctx):
        routing = super().forward(x_TH, ctx)
        self.e_score_correction_bias.add_(torch.arange(E).flip(0) / E)
        return routing


class Doubles(V3):
    def forward(self, x_TH, ctx):
        routing = super().forward(x_TH, ctx)
        return replace(routing, weights_TK=routing.weights_TK * (1 + self.training))


class DropsInTraining(ExpertBank):
    def forward(self, x_TH, routing):
        y_TH = super().forward(x_TH, routing)
        return torch.nn.functional.dropout(y_TH, 0.5, self.training)


def of(kind):
    return router(kind, GROUPED)


def layer(kind=V3, **parts):
    return MoELayer(of(kind), bank(), **parts)


def dropping():
    made = DropsInTraining(H, E, I)
    made.load_state_dict(bank().state_dict())
    return made


def told(a, b, **asked):
    report = compare(a, b, inputs(), **asked)
    assert report.ok, report.table()
    return [note for note in report.notes if note.startswith("not compared")]


CASES = {
    "layer, second call": (layer, lambda: layer(Drifts), "MoELayer", SECOND, {}),
    "layer, training": (layer, lambda: layer(Doubles), "MoELayer", TRAINING, {}),
    "router, second call": (v3, lambda: of(Drifts), "Drifts", SECOND, {}),
    "router, training": (v3, lambda: of(Doubles), "Doubles", TRAINING, {}),
    "bank, training": (bank, dropping, "DropsInTraining", TRAINING, {"routing": routing()}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_one_side_alone_does_elsewhere_is_told(case):
    right, other, name, occasion, asked = CASES[case]
    assert told(right(), other(), **asked) == [f"not compared: b, {name}, {occasion}"]
    (of_a,) = told(other(), right(), **asked)
    assert of_a == f"not compared: a, {name}, {occasion}"
    assert told(right(), right(), **asked) == told(other(), other(), **asked) == []


@pytest.mark.parametrize("backend", [None, "reference"], ids=["stock", "replaced"])
def test_so_it_is_of_a_block_of_transformers(backend):
    block, x, ctx = block_of("mixtral", torch.float32, backend)
    other, kind = copy.deepcopy(block), type(block)

    def forward(self, *args, **kwargs):
        return kind.forward(self, *args, **kwargs) * (1 + self.training)

    other.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    report = compare(block, other, x, ctx=ctx)
    assert report.ok and [n for n in report.notes if n.endswith(TRAINING)], report.notes
    assert not any("not compared" in note for note in compare(block, block, x, ctx=ctx).notes)


def test_noise_that_both_draw_is_no_news():
    def noisy():
        torch.manual_seed(0)
        made = NoisyTopKRouter(H, E, K)
        torch.nn.init.normal_(made.weight)
        return MoELayer(made, bank(), dispatcher=Local(Capacity(1.0)))

    assert told(noisy(), noisy()) == []


def test_what_moves_a_router_between_steps_is_told():
    slow, fast = (layer(controllers=[BiasUpdate(rate)]) for rate in (1e-3, 1e-2))
    words = ["('BiasUpdate(0.001, centred=False)',)", "('BiasUpdate(0.01, centred=False)',)"]
    assert told(slow, fast) == [
        f"not compared, and the two differ in it: controllers {words[0]} in a, {words[1]} in b"
    ]
    assert told(slow, layer()) == [
        f"not compared, and the two differ in it: controllers {words[0]} in a, () in b"
    ]
    assert told(slow, layer(controllers=[BiasUpdate(1e-3)])) == []


def test_the_scale_of_a_loss_is_told():
    once, thrice = (layer(losses=[RouterZLoss(1e-3)], aux_scale=scale) for scale in (1.0, 3.0))
    assert told(once, thrice) == [
        "not compared, and the two differ in it: aux_scale 1.0 in a, 3.0 in b"
    ]


def test_nothing_that_was_compared_moves():
    drifting = layer(Drifts, controllers=[BiasUpdate(1e-3)])
    before = copy.deepcopy(drifting.state_dict())
    state = torch.get_rng_state()
    told(layer(), drifting)
    assert all(torch.equal(drifting.state_dict()[name], held) for name, held in before.items())
    assert torch.equal(torch.get_rng_state(), state) and drifting.training
