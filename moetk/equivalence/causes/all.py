"""Every known cause, in the order of the stages; those that fit any stage come last."""

from moetk.equivalence.cause import Cause
from moetk.equivalence.causes.activation import ACTIVATION
from moetk.equivalence.causes.any_stage import ANY_STAGE
from moetk.equivalence.causes.choice import CHOICE
from moetk.equivalence.causes.combine import COMBINE
from moetk.equivalence.causes.counts import COUNTS
from moetk.equivalence.causes.dispatch import DISPATCH
from moetk.equivalence.causes.experts import EXPERTS
from moetk.equivalence.causes.gradients import GRADIENTS
from moetk.equivalence.causes.indices import INDICES
from moetk.equivalence.causes.logits import LOGITS
from moetk.equivalence.causes.losses import LOSSES
from moetk.equivalence.causes.output import OUTPUT
from moetk.equivalence.causes.scores import SCORES
from moetk.equivalence.causes.weights import WEIGHTS

CAUSES: tuple[Cause, ...] = (
    *LOGITS,
    *SCORES,
    *CHOICE,
    *INDICES,
    *WEIGHTS,
    *COUNTS,
    *DISPATCH,
    *EXPERTS,
    *ACTIVATION,
    *COMBINE,
    *OUTPUT,
    *LOSSES,
    *GRADIENTS,
    *ANY_STAGE,
)
