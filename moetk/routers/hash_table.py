from __future__ import annotations

import torch
from torch import Tensor

from moetk.errors import RouterConfigError
from moetk.settings import check_whole


def random_table(vocab_size: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """top_k different experts for every token id, (vocab_size, top_k) int64 (arXiv 2106.04426).

    The same table for the same seed. Raises RouterConfigError unless vocab_size >= 1 and
    1 <= top_k <= E.
    """
    check_whole("random_table", vocab_size=vocab_size, num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise RouterConfigError(
            f"random_table: top_k={top_k} but num_experts={num_experts}; "
            f"need 1 <= top_k <= {num_experts}."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(vocab_size, num_experts, generator=generator).topk(top_k).indices
