"""A mask of 0 hides a group where scores are never negative, and nowhere else."""

import pytest
import torch

from moetk import compare
from moetk.kernels.selection import in_best_groups, normalise
from moetk.routers import gather
from tests.equivalence.steps import GROUPED, V3, Mixtral, inputs, router


def masked_with(number):
    def limit(self, scores_TE, logits_TE):
        choice_TE = in_best_groups(self.with_choice_bias(scores_TE), 4, 2)
        return choice_TE.masked_fill(choice_TE == -torch.inf, number)

    return limit


def sigmoid(bias, number):
    made = router(V3, GROUPED, limit=masked_with(number))
    made.e_score_correction_bias.mul_(bias)
    return made


def softmax(number, score=lambda self, logits_TE: logits_TE.softmax(-1)):
    return router(Mixtral, {}, score=score, limit=masked_with(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [lambda n: sigmoid(0.0, n), softmax], ids=["sigmoid", "softmax"])
def test_a_mask_of_zero_among_shares_is_the_same_choice(made, dtype):
    right, zero = made(-torch.inf).to(dtype), made(0.0).to(dtype)
    for a, b in ((right, zero), (zero, right)):
        report = compare(a, b, inputs().to(dtype))
        assert report.ok, report.table()


def test_a_mask_of_zero_beside_negative_numbers_is_the_defect_that_it_is():
    report = compare(sigmoid(1.0, -torch.inf), sigmoid(1.0, 0.0), inputs())
    assert (report.first.stage, report.cause) == ("choice", "group mask multiplies by 0")


def test_a_mask_of_zero_among_logits_is_the_defect_that_it_is():
    def weigh(self, scores_TE, ids_TK, choice_TE, logits_TE):
        return normalise(gather(logits_TE.softmax(-1), ids_TK))

    right, wrong = (
        router(Mixtral, {}, score=lambda s, l: l, limit=masked_with(number), weigh=weigh)
        for number in (-torch.inf, 0.0)
    )
    report = compare(right, wrong, inputs())
    assert report.first is not None and report.first.stage == "choice", report.table()


def test_another_mask_among_shares_shows():
    report = compare(softmax(-torch.inf), softmax(1e-3), inputs())
    assert report.first is not None and report.first.stage == "choice", report.table()
