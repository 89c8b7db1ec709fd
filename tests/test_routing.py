"""A routing as a value: what is read from it, what is let go, and that trees of tensors take it."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch.utils import _pytree

from moetk.errors import MissingFieldError
from moetk.routing import ExpertChoice, SoftChoice, TokenChoice, detached, keep_fields, need

T, E, K = 6, 4, 2
KINDS = [
    TokenChoice(torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K), E),
    ExpertChoice(torch.zeros(E, 3, dtype=torch.int64), torch.ones(E, 3), T),
    SoftChoice(torch.ones(2, 3, 8), torch.ones(2, 3, 8), E),
]


def token_choice(**changes: object) -> TokenChoice:
    return replace(KINDS[0], **changes)


def test_need_finds_fields_and_extras_and_says_who_asked():
    std_TE, logits_TE = torch.ones(T, E), torch.zeros(T, E)
    routing = token_choice(logits_TE=logits_TE, extras={"std_TE": std_TE})
    assert need(routing, "logits_TE", "Z") is logits_TE
    assert need(routing, "std_TE", "Z") is std_TE
    message = "Z reads scores_TE, which this TokenChoice does not carry: its router left it out."
    with pytest.raises(MissingFieldError, match=re.escape(message)):
        need(routing, "scores_TE", "Z")


def test_keep_fields_drops_what_nobody_reads():
    table = torch.zeros(T, E)
    routing = token_choice(logits_TE=table, scores_TE=table, choice_TE=table, kept_TK=table)
    kept = keep_fields(routing, frozenset({"scores_TE"}))
    assert (kept.logits_TE, kept.choice_TE) == (None, None)
    assert kept.scores_TE is table and kept.kept_TK is table
    everything = frozenset({"logits_TE", "scores_TE", "choice_TE"})
    assert keep_fields(routing, everything) is routing
    plain = token_choice()
    assert keep_fields(plain, frozenset()) is plain  # nothing to drop, nothing to copy
    assert keep_fields(KINDS[2], frozenset()) is KINDS[2]


def test_detached_keeps_values_and_no_graph():
    leaf_TE = torch.ones(T, E, requires_grad=True)
    routing = token_choice(
        weights_TK=leaf_TE[:, :K] * 2, logits_TE=leaf_TE * 3, extras={"std_TE": leaf_TE * 4}
    )
    free = detached(routing)
    for name, value in [("weights_TK", 2), ("logits_TE", 3)]:
        tensor = getattr(free, name)
        assert not tensor.requires_grad and tensor.unique().tolist() == [value]
    assert not free.extras["std_TE"].requires_grad and free.extras["std_TE"].unique() == 4
    assert free.scores_TE is None and free.num_experts == E
    assert routing.weights_TK.requires_grad  # the caller's own is as it was

    bare = detached(routing, frozenset())
    assert bare.logits_TE is None and bare.extras == {}
    both_kept = detached(routing, frozenset({"logits_TE", "extras"}))
    assert both_kept.logits_TE is not None and set(both_kept.extras) == {"std_TE"}


@pytest.mark.parametrize("routing", KINDS, ids=lambda routing: type(routing).__name__)
def test_a_routing_is_a_tree_whose_leaves_are_its_fields(routing):
    keyed, spec = _pytree.tree_flatten_with_path(routing)
    again = _pytree.tree_unflatten([leaf for _, leaf in keyed], spec)
    assert type(again) is type(routing)
    given = {f".{f.name}": getattr(routing, f.name) for f in fields(routing)}
    found = {_pytree.keystr(path): leaf for path, leaf in keyed}
    assert given.pop(".extras") == {}  # a tree of its own, without a leaf
    assert found.keys() == given.keys() and all(found[name] is given[name] for name in given)


@pytest.mark.parametrize("routing", KINDS, ids=lambda routing: type(routing).__name__)
def test_a_routing_is_frozen_and_equals_itself_alone(routing):
    for field in fields(routing):
        with pytest.raises(FrozenInstanceError):
            setattr(routing, field.name, None)
    # By identity: comparing tensors gives no bool.
    assert routing in [routing] and routing != detached(routing) and hash(routing)
    assert routing.num_experts == E
