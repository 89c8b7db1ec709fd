"""Layers that count, with a controller or a counter of their router's: judged as any other, in fp64
too."""

import pytest
import torch

from moetk import MoELayer, compare
from moetk.controllers import BiasUpdate
from tests.equivalence.steps import (
    GROUPED,
    V3,
    E,
    Mixtral,
    bank,
    gather,
    inputs,
    largest,
    mixtral,
    normalise,
    router,
    v3,
)


def smallest(self, choice_TE):
    return largest(-choice_TE, self.top_k)


def shifted(self, choice_TE):
    return (largest(choice_TE, self.top_k) + 1) % E


def steered(router):
    return MoELayer(router, bank(), controllers=[BiasUpdate(1e-3)])


class Counting:
    """Counts its choices in training, in floats."""

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.register_buffer("tokens", torch.zeros(E))

    def pick(self, choice_TE):
        return largest(choice_TE, self.top_k)

    def select(self, choice_TE):
        ids_TK = self.pick(choice_TE)
        if self.training:
            self.tokens += ids_TK.flatten().bincount(minlength=E)
        return ids_TK


class CountingMixtral(Counting, Mixtral):
    """Softmax scores."""


class CountingV3(Counting, V3):
    """Sigmoid scores in groups."""


def counting(kind, **steps):
    return router(kind, GROUPED if kind is CountingV3 else {}, own=True, **steps)


def judged(a, b):
    report = compare(a, b, inputs())
    assert not any("not judged" in note or "no fp64 truth" in note for note in report.notes)
    return report


def test_a_layer_is_its_copy():
    report = judged(steered(v3()), steered(v3()))
    assert report.ok and report.notes == ()


@pytest.mark.parametrize(
    ("pick", "cause"), [(smallest, "the smallest are chosen"), (shifted, "ids shifted by one")]
)
@pytest.mark.parametrize(
    "pair",
    [
        lambda pick: (steered(v3()), steered(v3(select=pick))),
        lambda pick: (counting(CountingMixtral), counting(CountingMixtral, pick=pick)),
        lambda pick: (counting(CountingV3), counting(CountingV3, pick=pick)),
        lambda pick: (counting(CountingMixtral), mixtral(select=pick)),
    ],
    ids=["steered", "mixtral", "v3", "one of them"],
)
def test_another_choice_is_no_tie(pair, pick, cause):
    report = judged(*pair(pick))
    assert report.first.stage == "indices" and report.cause == cause
    assert report.choices.flipped == report.choices.total and not report.choices.tied


def test_a_difference_below_fp32_is_a_function():
    def weigh(self, scores_TE, ids_TK, choice_TE, logits_TE):
        return normalise(gather(scores_TE, ids_TK), 1e-7) * self.scale

    report = judged(steered(v3()), steered(v3(weigh=weigh)))
    assert report.first.stage == "weights" and 1e-10 < report.first.function < 1e-6
