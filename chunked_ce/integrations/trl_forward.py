"""The forward that TRL calls with ``fused_lm_head=True``, of lazy logits; `chunked_ce.integrations.trl` installs it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chunked_ce.lazy.activity import during
from chunked_ce.lazy.head import LazyHead
from chunked_ce.lazy.logits import Lazy
from chunked_ce.lazy.obstacles import obstacle_of_head
from chunked_ce.lazy.output_embeddings import output_embeddings
from chunked_ce.lazy.targets import target_statistics
from chunked_ce.narrowing import not_none
from chunked_ce.token_statistics import TokenStatistics

__all__ = ["Fused", "always_lazy", "forward_of", "heads_of"]

_IGNORED = -100

# TRL's names of statistics, and ours; those without a gradient come last.
_OUTPUTS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_DIFFERENTIABLE = ("log_probs", "entropy")


def heads_of(model: nn.Module) -> list[LazyHead]:
    """The heads of a model, one or the copies that an adapter library keeps; none unless they are `LMHead`."""
    with contextlib.suppress(ValueError):
        heads = output_embeddings(model, None)
        lazy = [head for head in heads if isinstance(head, LazyHead)]
        return lazy if len(lazy) == len(heads) else []
    return []


@contextlib.contextmanager
def always_lazy(model: nn.Module) -> Iterator[None]:
    """In evaluation mode too."""
    settings = [head._settings for head in heads_of(model)]
    before = [one.lazy for one in settings]
    try:
        for one in settings:
            one.lazy = "always"
        yield
    finally:
        for one, lazy in zip(settings, before, strict=True):
            one.lazy = lazy


class Fused(NamedTuple):
    """What a fused forward computes."""

    names: tuple[str, ...]  # of the outputs, as TRL calls them
    temperature: float
    is_sft: bool  # whose loss has the head's terms, and whose metrics may come after the loss
    output_class: type

    def output(
        self,
        model: nn.Module,
        outputs: Any,  # of the model: logits and, of a mixture of experts, aux_loss
        labels: Tensor,  # (batch, time)
        is_shifted: bool,
        temperature: Tensor | None,  # of the labels
        num_items: Tensor | int | None,
    ) -> Any:
        logits = outputs.logits
        labels = labels.to(logits.device)
        if temperature is not None:
            temperature = temperature.to(logits.device).expand(labels.shape)
        if not is_shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
            temperature = None if temperature is None else temperature[:, 1:]
        if temperature is not None:
            logits = logits / temperature.unsqueeze(-1)
        elif self.temperature != 1:
            logits = logits / self.temperature
        is_lazy = isinstance(logits, Lazy) and not logits.is_computed
        terms = logits._root.call.keywords_of_loss(0.0) if self.is_sft and model.training and is_lazy else {}
        terms = {name: terms[name] for name in _TERMS if terms.get(name)}
        asked = [_OUTPUTS[name] for name in self.names] + [one for term in terms for one in _TERMS[term]]
        with during(model.forward):
            found = target_statistics(logits, labels, tuple(dict.fromkeys(asked)))
        values = {name: getattr(found, _OUTPUTS[name]) for name in self.names}
        values = {name: x if name in _DIFFERENTIABLE else x.detach() for name, x in values.items()}
        if "is_top1" in values:
            values["is_top1"] = values["is_top1"].bool()
        if terms:
            values["log_probs"] = -_with_terms(found, **terms)
        mask = labels != _IGNORED
        loss = -values["log_probs"].sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            config = _of_transformers(model).config.get_text_config()
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return self.output_class(loss=loss, **values, label_mask=mask, aux_loss=aux_loss)


def forward_of(model: nn.Module, fused: Fused) -> Callable[..., Any]:
    """The forward of ``model``, which with ``fused_lm_head=True`` returns statistics of its lazy logits."""
    before = vars(model).get("forward")
    kept: list[_Kept] = []  # of the last forward, if its logits were lazy

    # `generate` checks its arguments by this signature.
    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        original = before or types.MethodType(type(self).forward, self)
        last = kept.pop() if kept else None
        if not fused_lm_head:
            outputs = original(*args, **kwargs)
            is_lazy = isinstance(getattr(outputs, "logits", None), Lazy)
            if is_lazy and fused.is_sft and self.training and torch.is_grad_enabled():
                kept.append(_Kept.of(args, kwargs, outputs))
            return outputs
        labels, shifted, temperature, num_items = (
            kwargs.pop(name, None) for name in ("labels", "shift_labels", "temperature", "num_items_in_batch")
        )
        kwargs["use_cache"] = False
        if last is not None and not torch.is_grad_enabled() and last.is_of(args, kwargs):
            outputs = last.outputs  # label smoothing took its loss from them, the metrics come from them as well
        else:
            outputs = _lazy_outputs(self, original, args, kwargs)
        is_shifted = shifted is not None
        return fused.output(self, outputs, shifted if is_shifted else labels, is_shifted, temperature, num_items)

    return forward


class _Outputs(NamedTuple):
    logits: Tensor
    aux_loss: Tensor | None


class _Kept(NamedTuple):
    """Inputs of a forward, and its outputs without a graph."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: _Outputs

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> _Kept:
        aux_loss = getattr(outputs, "aux_loss", None)
        return cls(args, kwargs, _Outputs(outputs.logits.detach(), None if aux_loss is None else aux_loss.detach()))

    def is_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        names = self.kwargs.keys()
        same = len(args) == len(self.args) and names == kwargs.keys()
        pairs = [*zip(self.args, args, strict=True), *((self.kwargs[n], kwargs[n]) for n in names)] if same else ()
        return same and all(_is_same(a, b) for a, b in pairs)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same memory, which an engine may have put into another tensor."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return a is b or (isinstance(a, bool | int) and type(a) is type(b) and a == b)


def _lazy_outputs(
    model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Outputs:
    """The outputs of a forward without labels: lazy logits, and the loss of a mixture of experts if it has one."""
    config = _of_transformers(model).config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    wants_aux = bool(kwargs.get("output_router_logits"))
    routed: list[Tensor | tuple[Tensor, ...]] = []

    def keep(_: nn.Module, __: Any, outputs: Any) -> None:
        routed.append(outputs.router_logits)

    hook = _of_transformers(model).base_model.register_forward_hook(keep) if wants_aux else None
    try:
        with always_lazy(model):
            outputs = forward(*args, **kwargs)
    finally:
        if hook is not None:
            hook.remove()
    if not isinstance(outputs.logits, Lazy):
        _tell_of_whole_logits(model)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None and wants_aux:  # most families return it
        balance = importlib.import_module("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
        aux_loss = balance(routed[0], config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask"))
    return _Outputs(outputs.logits, aux_loss)


def _of_transformers(model: nn.Module) -> Any:
    """A model whose attributes are those of a ``PreTrainedModel``."""
    return model


def _tell_of_whole_logits(model: nn.Module) -> None:
    for head in heads_of(model):
        why = obstacle_of_head(head) or "something around the head changes them in a way that lazy logits do not follow"
        said = f"the logits for a loss of TRL's are computed as a whole, with the memory that they take: {why}"
        head.record.tell("trl", f"{said}. Remove that, or leave this model to TRL's own head: uninstall()")


# What the terms of a head need, which the loss of SFT has no argument for.
_TERMS = {"z_loss": ("lse",), "label_smoothing": ("lse", "mean_logit")}


def _with_terms(found: TokenStatistics, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each token, as `linear_cross_entropy` has it."""
    loss = -not_none(found.logprob)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (not_none(found.lse) - not_none(found.mean_logit))
    return loss + z_loss * not_none(found.lse).square() if z_loss else loss
