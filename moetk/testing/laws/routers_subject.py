"""A router made ready for its laws: copies of it, in float64 where it can, and what was measured.

The router that was handed in is never called and never changed; its copies are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.errors import MissingContextError, RouterConfigError
from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice, check_routing
from moetk.testing.law import Case
from moetk.testing.laws.routers_told import by_token, differing, every_tensor, same_bits
from moetk.testing.strategies.inputs import rows_of
from moetk.testing.strategies.sequences import positions, token_ids

Router = Callable[[Tensor, RouterContext], Routing]
DECLARED_DTYPES = ("gemm_dtype", "score_dtype", "weight_dtype")
CHOICE_BIAS = "e_score_correction_bias"
GROUP_NAMES = (("groups", "top_groups"), ("n_group", "topk_group"))
PROBES = tuple((pattern, seed) for pattern in ("gaussian", "collapsed") for seed in range(4))


class RouterSubject:
    """A router and its sizes.

    router: any callable (x_TH, ctx) -> Routing. hidden_size, num_experts: None = read off the
    router (`hidden_size`, `num_experts`, or the matrices it holds) or its first routing.

    A declaration of the router itself is believed: `duplicates` (one token may name one expert
    twice), `surrogate_gradient` (its gradient is, on purpose, not its derivative), `per_batch`
    (its choice balances over the whole batch, on purpose), `experts_differ` (some experts are
    shared, or scaled, by their number), `train_differs` (without noise, too, it routes otherwise in
    training).

    Constant parameters, as of a router that starts at zero, are moved off their start in the
    copies: where all scores are equal, most laws would hold of any router.

    Raises RouterConfigError when a size cannot be read off, cannot be right, or no copy runs.
    """

    def __init__(
        self, router: Router, hidden_size: int | None = None, num_experts: int | None = None
    ) -> None:
        check_callable(router)
        self.original = router
        self.name = getattr(router, "__name__", type(router).__name__)
        self.hidden_size = _hidden_size(router, self.name) if hidden_size is None else hidden_size
        self.duplicates = bool(getattr(router, "duplicates", False))
        self.surrogate_gradient = bool(getattr(router, "surrogate_gradient", False))
        self.per_batch = bool(getattr(router, "per_batch", False))
        self.experts_differ = bool(getattr(router, "experts_differ", False))
        self.train_differs = bool(getattr(router, "train_differs", False))
        self.dtype = torch.float64
        self._copies: dict[tuple[bool, torch.dtype], Router] = {}
        self.first = self._first_routing()
        known = getattr(router, "num_experts", None) if num_experts is None else num_experts
        if known is not None and not isinstance(known, int):
            raise RouterConfigError(f"{self.name}: num_experts={known!r} is not a whole number.")
        self.num_experts = self.first.num_experts if known is None else known

    # -- running it

    def fresh(self, *, training: bool = False, dtype: torch.dtype | None = None) -> Router:
        """A new copy on the CPU, in self.dtype or in `dtype`, in that mode."""
        dtype = dtype or self.dtype
        try:
            router = copy.deepcopy(self.original, _without_graphs(self.original))
        except Exception as error:
            raise RouterConfigError(
                f"{self.name} cannot be copied ({error}), and laws are checked on a copy: give a "
                "router whose state is parameters, buffers and plain values."
            ) from error
        if isinstance(router, nn.Module):
            router.to("cpu", dtype).train(training)
            for module in router.modules():
                for name in DECLARED_DTYPES:
                    if isinstance(getattr(module, name, None), torch.dtype):
                        setattr(module, name, dtype)
            move_off_start(router)
        return router

    def copy_at(self, training: bool) -> Router:
        """A copy that is made once: for laws that do not change it."""
        key = training, self.dtype
        if key not in self._copies:
            self._copies[key] = self.fresh(training=training)
        return self._copies[key]

    def route(self, x_TH: Tensor, ctx: RouterContext, *, training: bool = False) -> Routing:
        """The routing of a copy, without graph."""
        with torch.no_grad():
            return self.copy_at(training)(x_TH.to(self.dtype), ctx)

    def trained(self, router: Router) -> dict[str, Tensor]:
        """The parameters of a copy that require a gradient, by name."""
        named = router.named_parameters() if isinstance(router, nn.Module) else ()
        return {name: tensor for name, tensor in named if tensor.requires_grad}

    def on(self, case: Case) -> Routing:
        """The routing of the case as it was drawn."""
        training = bool(case.settings.get("training", False))
        return self.route(case["x_TH"], context_of(case), training=training)

    def in_dtype(self, dtype: torch.dtype) -> RouterSubject:
        """The same router, run and declared in another dtype."""
        other = copy.copy(self)
        other.dtype, other._copies = dtype, {}
        return other

    @cached_property
    def half(self) -> RouterSubject | None:
        """The router in bfloat16 throughout, None where it does not run so."""
        return self._where_it_runs(torch.bfloat16)

    @cached_property
    def single(self) -> RouterSubject | None:
        """The router in float32 throughout, None where it does not run so."""
        return self._where_it_runs(torch.float32)

    def _where_it_runs(self, dtype: torch.dtype) -> RouterSubject | None:
        other = self.in_dtype(dtype)
        try:
            other.route(*other.probe())
        except Exception:  # whatever a user's code raises, it says: not in this dtype
            return None
        return other

    @cached_property
    def rounded(self) -> RouterSubject:
        """The router in self.dtype, its parameters rounded to bfloat16 first."""
        other, router = self.in_dtype(self.dtype), self.fresh()
        if isinstance(router, nn.Module):
            with torch.no_grad():
                for tensor in router.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.copy_(tensor.bfloat16())
        other._copies[False, self.dtype] = router
        return other

    # -- what it is

    @property
    def is_module(self) -> bool:
        return isinstance(self.original, nn.Module)

    @property
    def chooses_tokens(self) -> bool:
        return isinstance(self.first, ExpertChoice)

    @property
    def chooses_experts(self) -> bool:
        return isinstance(self.first, TokenChoice)

    @property
    def top_k(self) -> int:
        assert isinstance(self.first, TokenChoice)
        return self.first.experts_TK.shape[1]

    @property
    def drops(self) -> bool:
        return isinstance(self.first, TokenChoice) and self.first.kept_TK is not None

    @property
    def has_choice_bias(self) -> bool:
        if not isinstance(self.original, nn.Module):
            return False
        held = {**dict(self.original.named_parameters()), **dict(self.original.named_buffers())}
        return CHOICE_BIAS in held

    @property
    def groups(self) -> tuple[int, int] | None:
        """(groups, of which a token may use) where the router declares them."""
        for names in GROUP_NAMES:
            total, used = (getattr(self.original, name, None) for name in names)
            if isinstance(total, int) and isinstance(used, int) and total > 0:
                return total, used
        return None

    @property
    def bias(self) -> Tensor:
        """The choice bias that the copies start from."""
        held: Tensor = getattr(self.copy_at(False), CHOICE_BIAS)
        return held.detach().clone()

    def with_bias(self, bias_E: Tensor) -> Router:
        """A fresh copy with that choice bias."""
        router = self.fresh()
        with torch.no_grad():
            held: Tensor = getattr(router, CHOICE_BIAS)
            held.copy_(bias_E.to(held.dtype))
        return router

    @cached_property
    def draws_noise(self) -> bool:
        """Measured: in training it differs with another ctx.seed, or does without one."""
        if not self.is_module:
            return False
        try:
            return any(self.minds(True, seed=seed) for seed in (*range(1, 9), None))
        except MissingContextError:
            return True

    def minds(self, training: bool = False, **changes: Any) -> bool:
        """Measured: any tensor of its routing differs where its context has these changes."""
        for pattern, seed in PROBES:
            x_TH, ctx = self.probe(pattern, seed)
            told = every_tensor(self.route(x_TH, ctx, training=training))
            other = every_tensor(self.route(x_TH, replace(ctx, **changes), training=training))
            if told.keys() != other.keys():
                return True
            if any(not same_bits(tensor, other[name]) for name, tensor in told.items()):
                return True
        return False

    @cached_property
    def mixes(self) -> bool:
        """Measured: the routing of a token changes with other tokens of its sequence."""
        for pattern, seed in PROBES:
            x_TH, ctx = self.probe(pattern, seed)
            before = by_token(self.route(x_TH, ctx))
            for token in (0, len(x_TH) // 2, len(x_TH) - 1):
                others_TH = rows_of("gaussian", seed + 100, *x_TH.shape)
                others_TH[token] = x_TH[token]
                after = by_token(self.route(others_TH, ctx))
                if differing(before, after)[token]:
                    return True
        return False

    @cached_property
    def choice_reads_x(self) -> bool:
        """Measured: what is chosen changes with the input."""
        x_TH, ctx = self.probe()
        before = by_token(self.route(x_TH, ctx))
        for seed in range(1, 6):
            after = by_token(self.route(rows_of("gaussian", seed, *x_TH.shape), ctx))
            if not torch.equal(before["chosen"], after["chosen"]):
                return True
        return not self.chooses_experts

    # -- probing

    def probe(self, pattern: str = "gaussian", seed: int = 0) -> tuple[Tensor, RouterContext]:
        """One sequence of twelve tokens, and a whole context without a replay."""
        x_TH = rows_of(pattern, seed, 12, self.hidden_size)
        return x_TH, plain_context(1, 12, seed)

    def _first_routing(self) -> Routing:
        """In float64 if it runs so, else in the dtype of its own parameters."""
        routing = self._first_answer()
        if not isinstance(routing, (TokenChoice, ExpertChoice, SoftChoice)):
            # The laws judge what a routing holds; here it says that this is none.
            check_routing(routing, 0, 0, where=self.name)
        return routing

    def _first_answer(self) -> Routing:
        with torch.random.fork_rng(devices=[]):
            try:
                return self.route(*self.probe())
            except MissingContextError as error:
                raise RouterConfigError(
                    f"{self.name} needs what no check can draw: {error} Hand in a function that "
                    "completes the context: lambda x_TH, ctx: router(x_TH, replace(ctx, ...))."
                ) from error
            except Exception as in_double:
                self.dtype = _own_dtype(self.original)
                self._copies.clear()
                try:
                    return self.route(*self.probe())
                except Exception as error:
                    x_TH, _ = self.probe()
                    raise RouterConfigError(
                        f"{self.name} does not route x_TH {tuple(x_TH.shape)}, neither in float64 "
                        f"({in_double}) nor in {self.dtype} ({type(error).__name__}: {error}). Is "
                        f"hidden_size={self.hidden_size} its width, and is it called as "
                        "(x_TH, ctx)?"
                    ) from error


def router_subject(
    router: Router, hidden_size: int | None = None, num_experts: int | None = None
) -> RouterSubject:
    """What `LawReport.repro` calls in the file that it writes."""
    return RouterSubject(router, hidden_size, num_experts)


def check_callable(router: object) -> None:
    """Raise RouterConfigError for what is no router yet: a class, or nothing to call."""
    if isinstance(router, type):
        raise RouterConfigError(
            f"{router.__name__} is a class; check a router that is made of it: "
            f"{router.__name__}(...)."
        )
    if not callable(router):
        raise RouterConfigError(
            f"{router!r} is not a router: a router is called as (x_TH, ctx) and returns a routing."
        )


def _hidden_size(router: Router, name: str) -> int:
    declared = getattr(router, "hidden_size", None)
    if isinstance(declared, int):
        return declared
    tensors = router.parameters() if isinstance(router, nn.Module) else ()
    widths = {tensor.shape[1] for tensor in tensors if tensor.ndim == 2}
    if len(widths) != 1:
        found = f"its matrices have widths {sorted(widths)}" if widths else "it holds no matrix"
        raise RouterConfigError(
            f"{name} does not say how wide its input is ({found}): pass hidden_size=..."
        )
    return int(widths.pop())


def _without_graphs(router: Router) -> dict[int, Any]:
    """What deepcopy takes for done: results that the router keeps, which it refuses to copy."""
    modules = router.modules() if isinstance(router, nn.Module) else ()
    held = (tensor for module in modules for tensor in vars(module).values())
    return {
        id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and t.grad_fn is not None
    }


def _own_dtype(router: Router) -> torch.dtype:
    tensors = router.parameters() if isinstance(router, nn.Module) else ()
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


@torch.no_grad()
def move_off_start(router: nn.Module) -> None:
    """Add noise to parameters that are all one number, a 0 alone too, and to the choice bias."""
    generator = torch.Generator().manual_seed(0)
    biases = [t for name, t in router.named_buffers() if name.endswith(CHOICE_BIAS)]
    for tensor in (*router.parameters(), *biases):
        # One number alone is a start where it is 0, as of a gate that opens; a temperature of 1 is
        # where it should be.
        one = tensor.numel() == 1 and bool((tensor != 0).all())
        if not tensor.is_floating_point() or tensor.numel() == 0 or one:
            continue
        if bool((tensor == tensor.max()).all()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            width = tensor.shape[-1] if tensor.ndim else 1
            tensor += (noise * width**-0.5).to(tensor.dtype)


# -- contexts


def plain_context(batch: int, length: int, seed: int) -> RouterContext:
    """A whole context without padding: B sequences of S."""
    num_tokens = batch * length
    return RouterContext(
        token_ids=token_ids(seed, num_tokens),
        positions=positions(batch, length),
        sequence_ids=torch.arange(batch).repeat_interleave(length),
        token_mask=torch.ones(num_tokens, dtype=torch.bool),
        batch_shape=(batch, length),
        seed=seed,
    )


def context_of(case: Case, **changes: Any) -> RouterContext:
    """The context of a case: `plain_context` of its settings batch, length and seed, with the
    tensors that the case holds of the same names in place of drawn ones."""
    batch, length, seed = (int(case.settings[name] or 0) for name in ("batch", "length", "seed"))
    ctx = plain_context(batch, length, seed)
    held = {f.name: case.tensors[f.name] for f in fields(ctx) if f.name in case.tensors}
    return replace(ctx, **{**held, **changes})
