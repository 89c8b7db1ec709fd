"""Every error moetk raises. Each is a `MoetkError` and the builtin it refines.

A message names the tensor or setting, its shape or value, the module it sits in, and what to do.
"""

from __future__ import annotations

from typing import Any


class MoetkError(Exception):
    """Base of every error moetk raises."""


class RouterConfigError(MoetkError, ValueError):
    """A router, bank, loss or controller was built with settings that cannot work."""


class ConfigError(MoetkError, ValueError):
    """A configuration file has an unknown key or a value out of range."""


class MissingFieldError(MoetkError, ValueError):
    """A loss, controller or metric reads a field of a routing that the router left out."""


class MissingContextError(MoetkError, ValueError):
    """A router reads a field of its context that the model did not provide."""


class NonFiniteRoutingError(MoetkError, FloatingPointError):
    """Routing weights hold NaN or infinity."""


class MoeDtypeError(MoetkError, TypeError):
    """A tensor has a dtype that this place does not take."""


class MoeShapeError(MoetkError, ValueError):
    """A tensor has another shape than its name says."""


class DuplicateExpertError(MoetkError, ValueError):
    """A token names one expert twice and its router does not declare `duplicates = True`."""


class ExpertIndexError(MoetkError, IndexError):
    """An expert or token id is outside its range."""


class RoutingWeightError(MoetkError, ValueError):
    """An unused slot (-1) carries weight, or a weight contradicts the routing."""


class ReplayError(MoetkError, ValueError):
    """A replay does not fit the model, or a router ignored it."""


class UnsupportedRoutingError(MoetkError, NotImplementedError):
    """This bank or dispatcher cannot run this kind of routing."""


class ForeignExpertsError(MoetkError, ValueError):
    """Experts that are not moetk's would read a routing wrongly."""


class UnsupportedModelError(MoetkError, NotImplementedError):
    """The model holds a mixture-of-experts family that moetk has no row for."""


class ReplaceError(MoetkError, RuntimeError):
    """A block cannot be replaced as it stands; the model is left untouched."""


class BackendError(MoetkError, RuntimeError):
    """The requested backend cannot run this bank."""


class AuxScaleError(MoetkError, RuntimeError):
    """An attached loss does not know how large the model's own loss gradient is."""


class SecondOrderError(MoetkError, RuntimeError):
    """The gradient of a gradient was asked for where only the first is computed."""


class TopologyError(MoetkError, ValueError):
    """Ranks disagree, or a reduction over ranks is needed and was not given."""


class ShardCorruptError(MoetkError, OSError):
    """A stored file differs from the checksum written beside it, or is cut short."""


class UnsafePathError(MoetkError, ValueError):
    """A stored name points outside its folder."""


class UnsafeFormatError(MoetkError, ValueError):
    """A file in a format that can run code on load was offered."""


class MissingTensorError(MoetkError, KeyError):
    """A checkpoint lacks tensors that the model needs."""

    __str__ = Exception.__str__


class UnexpectedTensorError(MoetkError, KeyError):
    """A checkpoint holds tensors that the model has no place for."""

    __str__ = Exception.__str__


class SaveFailedError(MoetkError, OSError):
    """Nothing was written; what stood there before still stands."""


class SweepMismatchError(MoetkError, ValueError):
    """A sweep's folder was started from another configuration, code or data."""


class SweepLockedError(MoetkError, RuntimeError):
    """Another process is writing this sweep's folder."""


class LawBrokenError(MoetkError, AssertionError):
    """A part breaks a law of its kind. report: the whole check's, `moetk.testing.LawReport`."""

    report: Any = None


class EquivalenceError(MoetkError, ValueError):
    """Two implementations cannot be compared as they were given."""
