"""How many cases a test of laws draws: as many as the profile says, in the way it says."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def drawn() -> dict[str, Any]:
    """`ci` draws 50, the same each time; `nightly` 1,000, others each time."""
    profile = settings()
    return {"examples": profile.max_examples, "derandomize": profile.derandomize}
