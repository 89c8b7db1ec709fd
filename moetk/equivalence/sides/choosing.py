"""Overhears how a gate of transformers chooses, and makes it choose otherwise.

Letters: T tokens, E experts, K choices a token, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SQUASHES = frozenset({"softmax", "sigmoid", "sigmoid_"})


@dataclass(frozen=True, eq=False)
class Selection:
    """One call that names K columns of each row: a topk, or a row of a table of ids.

    source: what it chose from, (T, E); None = a table.
    """

    ids_TK: Tensor
    source: Tensor | None
    version: int = 0

    @property
    def choice_TE(self) -> Tensor | None:
        """What it chose from, unless that was overwritten since."""
        source = self.source
        return source if source is not None and source._version == self.version else None


class Choosing(TorchFunctionMode):
    """Within it, every selection is noted; the `number`-th one returns `ids_TK` instead, and the
    values at them.

    A gate also chooses groups, and its code may be anybody's: which of the selections is the choice
    of experts is known only afterwards, by the ids that reached the experts (`number_of`).
    """

    def __init__(
        self, gate: nn.Module, number: int | None = None, ids_TK: Tensor | None = None
    ) -> None:
        super().__init__()
        held = (*gate.buffers(), *gate.parameters())
        self._tables = {t.untyped_storage().data_ptr() for t in held if not t.is_floating_point()}
        self._number, self._forced_TK = number, ids_TK
        self.selections: list[Selection] = []
        self._gathered: list[tuple[Tensor, int, Tensor]] = []
        self._squashed: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is None:
            return result
        if name == "topk" and source.ndim == 2:
            return self._select(result, source)
        if name in ("__getitem__", "embedding", "index_select") and isinstance(result, Tensor):
            of_table = source.untyped_storage().data_ptr() in self._tables
            if of_table and result.ndim == 2:
                return self._select(result, None)
        elif name == "gather" and source.ndim == 2:
            index = next(a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, Tensor))
            self._gathered.append((source, source._version, index))
        elif name in _SQUASHES and isinstance(result, Tensor):
            self._squashed.append((result, result._version))
        return result

    def _select(self, result: Any, source: Tensor | None) -> Any:
        if len(self.selections) == self._number:
            assert self._forced_TK is not None
            if source is None:
                result = self._forced_TK.to(result.dtype)
            else:
                values_TK = source.gather(1, self._forced_TK)
                result = torch.return_types.topk((values_TK, self._forced_TK))
        ids_TK = result if source is None else result[1]
        version = 0 if source is None else source._version
        self.selections.append(Selection(ids_TK.long(), source, version))
        return result

    def number_of(self, ids_TK: Tensor) -> int | None:
        """Which selection named these ids; None = none that was overheard."""
        for number, selection in enumerate(self.selections):
            if torch.equal(selection.ids_TK, ids_TK):
                return number
        return None

    def scores(self, ids_TK: Tensor, logits: Tensor | None) -> Tensor | None:
        """(T, E): the one softmax or sigmoid of that shape; else what the weights were gathered
        from, which comes second because a gate in error may gather them from biased scores.
        None where neither is certain."""
        shapes = {s.source.shape for s in self.selections if s.source is not None}
        wide = [(t, v) for t, v in self._squashed if t.shape in shapes and len(t) == len(ids_TK)]
        if len(wide) == 1 and wide[0][0]._version == wide[0][1]:
            return wide[0][0]
        for source, version, index in reversed(self._gathered):
            chosen = index.shape == ids_TK.shape and torch.equal(index, ids_TK)
            if chosen and source is not logits:
                return source if source._version == version else None
        return None

    def squashed(self, tensor: Tensor) -> bool:
        """The tensor is what a softmax or sigmoid returned: no logits."""
        return any(tensor is one for one, _ in self._squashed)
