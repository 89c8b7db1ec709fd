"""Dispatch: bringing tokens to their experts and back, and what does not fit on the way."""

from moetk.dispatch.capacity import Capacity, by_weight, dropped, first_come
from moetk.dispatch.dispatcher import Dispatcher, with_drops
from moetk.dispatch.local import Local

__all__ = [
    "Capacity",
    "Dispatcher",
    "Local",
    "by_weight",
    "dropped",
    "first_come",
    "with_drops",
]
