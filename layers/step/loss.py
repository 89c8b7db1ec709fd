"""The loss of a causal language model by chunks of rows: no logits of the whole batch."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from moetk.kernels.cross_entropy import CHUNK, linear_cross_entropy
from moetk.layers.step.part import ACTIVE, Part, is_watched
from moetk.layers.swap import own_class

HEADS = (
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "OlmoeForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
)
"""Models whose logits are their head's output and nothing else: no scale, no soft cap."""


class LossShell:
    """In front of a causal language model. In training with labels, `out.logits` is None."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *others: Any,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        stock = ACTIVE not in vars(self) or _why_stock(self) is not None
        if stock or others or not keeps_all or labels is None:
            if not keeps_all:
                kwargs["logits_to_keep"] = logits_to_keep
            return super().forward(  # type: ignore[misc]
                *given, labels, use_cache, *others, **kwargs
            )
        return _without_logits(self, *given, labels=labels, use_cache=use_cache, **kwargs)


@can_return_tuple  # type: ignore[untyped-decorator]
def _without_logits(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    inputs_embeds: Tensor | None,
    *,
    labels: Tensor,
    use_cache: bool | None,
    **kwargs: Any,
) -> Any:
    """As the stock forward, but for the logits."""
    pooled = vars(sys.modules[own_class(model).__module__]).get("load_balancing_loss_func")
    if pooled is not None and kwargs.get("output_router_logits") is None:
        kwargs["output_router_logits"] = model.config.output_router_logits
    targets = Targets(
        labels,
        kwargs.get("shift_labels"),
        kwargs.get("ignore_index", -100),
        model.lm_head.weight.device,
    )
    outputs = model.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )
    loss = targets.loss(outputs.last_hidden_state, model.lm_head, kwargs.get("num_items_in_batch"))
    aux_loss = None
    if pooled is not None and kwargs["output_router_logits"]:
        aux_loss = pooled(
            outputs.router_logits, model.num_experts, model.num_experts_per_tok, attention_mask
        )
        loss = loss + model.router_aux_loss_coef * aux_loss.to(loss.device)
    return MoeCausalLMOutputWithPast(
        loss=loss,
        aux_loss=aux_loss,
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        router_logits=getattr(outputs, "router_logits", None),
    )


class Targets:
    """Labels, shifted and flattened as transformers' ForCausalLMLoss does, and how many there are.

    On a GPU the number is fetched while the layers run: the copy is asked for before the first
    layer, and by the time the loss needs it the host waits for nothing but the start of this
    forward. Under CUDA graph capture and torch.compile all rows are computed, labelled or not.
    """

    def __init__(
        self, labels: Tensor, shifted: Tensor | None, ignore_index: int, device: torch.device
    ) -> None:
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        self.labels_T = shifted.reshape(-1).to(device)
        self.ignore_index = ignore_index
        self.ignored_T = self.labels_T == ignore_index
        self.labelled = (~self.ignored_T).sum()
        self.fetched: Tensor | None = None
        if device.type == "cuda" and not _captured():
            self.fetched, self.arrival = _fetched(self.labelled)

    def rows_N(self) -> Tensor | None:
        """The rows that have a label, in order; None = look at all."""
        if _captured():
            return None
        if self.fetched is None:
            number = int(self.labelled)
        else:
            self.arrival.synchronize()
            number = int(self.fetched)
        if number == len(self.labels_T):
            return None
        return self.ignored_T.argsort(stable=True)[:number]

    def loss(self, hidden: Tensor, head: nn.Linear, items: Tensor | float | None) -> Tensor:
        """Mean over the labelled rows, or their sum over `items` (num_items_in_batch)."""
        if isinstance(items, Tensor):
            items = items.to(hidden.device)
        hidden_TH = hidden.flatten(0, -2)
        weight_VH: Tensor = head.weight
        bias_V: Tensor | None = head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden_TH, weight_VH = hidden_TH.to(dtype), weight_VH.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        return linear_cross_entropy(
            hidden_TH,
            weight_VH,
            self.labels_T,
            self.labelled if items is None else items,
            bias_V=bias_V,
            rows_N=self.rows_N(),
            ignore_index=self.ignore_index,
        )


def _fetched(number: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Where the number will lie on the host, and the event behind which it does."""
    there = torch.empty((), dtype=torch.int64, pin_memory=True)
    there.copy_(number, non_blocking=True)
    arrival = torch.cuda.Event()
    # The copy is queued on the number's device, which need not be the current one.
    arrival.record(torch.cuda.current_stream(number.device))
    return there, arrival


def _captured() -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _why_stock(model: Any) -> str | None:
    head = model.lm_head
    if not model.training:
        return "logits are kept outside training"
    if model.loss_function is not ForCausalLMLoss:
        return "the model's loss_function is not ForCausalLMLoss"
    if type(head) is not nn.Linear or is_watched(head):
        return "lm_head is wrapped, sharded or hooked, and must be called"
    if type(head.weight) not in (nn.Parameter, Tensor):
        return f"lm_head.weight is a {type(head.weight).__name__}"
    if head.out_features != model.vocab_size:
        return f"lm_head has {head.out_features} rows, the vocabulary {model.vocab_size}"
    if torch.float16 in (head.weight.dtype, _autocast_dtype(head.weight.device.type)):
        return "fp16 gradients need the loss scale, which comes with backward only"
    return None


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _concerns(module: nn.Module) -> bool:
    return own_class(module).__name__.endswith("ForCausalLM")


def _refusal(module: nn.Module) -> str | None:
    name = own_class(module).__name__
    if name not in HEADS:
        return f"{name} is not listed in moetk.layers.step.loss as computing logits plainly"
    return None


def _runs(module: nn.Module) -> str:
    why = _why_stock(module)
    if why is not None:
        return f"stock: {why}"
    return f"moetk, chunks of {CHUNK} rows; out.logits is None"


LOSS = Part("loss", LossShell, _concerns, _refusal, _runs)
