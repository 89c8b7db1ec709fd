"""Does a token's routing depend on tokens after it?

A language model that is trained with such a router has seen its targets. Not a law: expert choice
and soft mixtures see later tokens by design, and are right where that is wanted. Capacity does so
too where all first choices are served before any second one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.testing.laws.routers_subject import RouterSubject, plain_context
from moetk.testing.laws.routers_told import by_token, differing
from moetk.testing.report import Causality
from moetk.testing.strategies.inputs import rows_of

LENGTH = 12
SEEDS = 8
PATTERNS = ("gaussian", "collapsed", "starved")


def measure_causality(subject: RouterSubject) -> Causality:
    """Change the tokens from a place on, and look at those before it: in evaluation and, for a
    module, in training with the same ctx.seed.

    Sequences of 12 in which experts are wanted evenly, by all at once, or hardly; the later tokens
    become others, or copies of the earlier ones, which want the same experts.
    """
    return Causality(
        evaluation=not _sees_later(subject, training=False),
        training=not _sees_later(subject, training=True) if subject.is_module else None,
    )


def _sees_later(subject: RouterSubject, *, training: bool) -> bool:
    ctx = plain_context(1, LENGTH, 0)
    with torch.random.fork_rng(devices=[]):
        for pattern in PATTERNS:
            for seed in range(SEEDS):
                x_TH = rows_of(pattern, seed, LENGTH, subject.hidden_size)
                others_TH = rows_of("gaussian", seed + 100, LENGTH, subject.hidden_size)
                cut = 1 + seed % (LENGTH - 1)
                before = _routed(subject, x_TH, ctx, training)
                for later_TH in (others_TH, x_TH.roll(cut, 0), x_TH[:1].expand_as(x_TH)):
                    changed_TH = torch.cat([x_TH[:cut], later_TH[cut:]])
                    after = _routed(subject, changed_TH, ctx, training)
                    if bool(differing(before, after)[:cut].any()):
                        return True
    return False


def _routed(
    subject: RouterSubject, x_TH: Tensor, ctx: RouterContext, training: bool
) -> dict[str, Tensor]:
    # A router that draws from the global generator is judged by law R6, not here.
    torch.default_generator.manual_seed(0)
    return by_token(subject.route(x_TH, ctx, training=training))
