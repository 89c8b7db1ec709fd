"""Controllers: objects that observe every routing and move a router once an optimizer step.

A controller has `accumulate` ("sum" or "cat", over micro-batches and ranks), `observe(routing,
ctx)`, which returns a tensor or a tuple of them, `step(observed)`, `state_dict()` and
`load_state_dict(state)`; and `bind(router)`, called once on each layer's own copy.
"""

from moetk.controllers.bias_update import BiasUpdate

__all__ = ["BiasUpdate"]
