"""Does a model's output at one place depend on what comes after it?

Expert choice, batch-wide quantiles and Sinkhorn normalisation choose among all tokens of a batch,
later ones included; a language model trained so has seen its targets. The test changes the second
half of every sequence and looks at the first. It looks in evaluation mode: a router that uses the
whole batch in training only comes out causal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
FLIPPED = 0.01
SCATTERED = 0.5


@torch.no_grad()
def is_causal(model: nn.Module, ids_BS: Tensor, vocabulary: int = 256) -> bool:
    """Whether, in evaluation, logits of the first half stay when every token of the second half is
    another.

    ids_BS: int64, S >= 2, several sequences. A place counts as changed when its logits move by more
    than 1e-4 of their size. One in a hundred may: other tokens regroup the experts' matrix
    products, and rounding can turn a near tie between two experts. Such places are scattered; one
    that changes in more than half of the sequences sees ahead, as the last place before the change
    does where a token is routed by the next one.
    """
    half = ids_BS.shape[1] // 2
    changed_BS = ids_BS.clone()
    changed_BS[:, half:] = (ids_BS[:, half:] + vocabulary // 2) % vocabulary
    training = model.training
    model.eval()
    before_BSV, after_BSV = (
        model(input_ids=ids, use_cache=False).logits[:, :half].double()
        for ids in (ids_BS, changed_BS)
    )
    model.train(training)
    moved_BS = (after_BSV - before_BSV).norm(dim=-1) > TOLERANCE * before_BSV.norm(dim=-1)
    moved_S = moved_BS.double().mean(0)
    return bool(moved_S.mean() <= FLIPPED and moved_S.max() <= SCATTERED)
