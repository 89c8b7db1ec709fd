"""Every known cause, in the order of the stages."""

from moetk.equivalence.cause import Cause

CAUSES: tuple[Cause, ...] = ()
