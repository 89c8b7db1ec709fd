"""The fewest tokens on which a difference still shows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moetk
from moetk.equivalence.fewest import fewest, narrowed, part
from moetk.equivalence.report import Question
from tests.equivalence.reported import E, T, hidden, one_wrong, stages


@settings(max_examples=40)
@given(st.integers(1, 20), st.data())
def test_fewest_finds_the_culprits(n, data):
    culprits = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=2))
    tried = []

    def fails(units):
        tried.append(list(units))
        return culprits <= set(units)

    assert fewest(range(n), fails) == sorted(culprits)
    assert len(tried) <= 64


def test_one_token_is_left_where_one_is_wrong():
    x = hidden(T).clamp(-1, 1)
    x[5, 0] = 2.0
    report = narrowed(moetk.compare(stages, one_wrong, x))
    assert torch.equal(report.question.x, x[5:6])


def test_sequences_stay_whole():
    x = hidden(4, 3).clamp(-1, 1)
    x[2, 1, 0] = 2.0
    report = narrowed(moetk.compare(stages, one_wrong, x))
    assert torch.equal(report.question.x, x[2:3])


def test_a_part_of_a_question_takes_what_belongs_to_its_tokens():
    x = hidden(3, 4)
    ctx = moetk.RouterContext(
        token_ids=torch.arange(12), token_mask=torch.ones(12, dtype=torch.bool), batch_shape=(3, 4)
    )
    routing = moetk.TokenChoice(torch.arange(12).view(12, 1) % E, torch.ones(12, 1), E)
    found = part(Question(None, None, x, ctx, routing), [0, 2])
    tokens = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(found.x, x[[0, 2]]) and found.ctx.batch_shape == (2, 4)
    assert found.ctx.token_ids.tolist() == tokens and found.ctx.positions is None
    assert found.routing.experts_TK.flatten().tolist() == [t % E for t in tokens]
    flat = part(Question(None, None, x.flatten(0, 1), ctx, routing), [1, 11])
    assert flat.ctx.token_ids.tolist() == [1, 11] and flat.ctx.batch_shape is None
