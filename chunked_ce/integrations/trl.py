"""TRL's trainers with this library in the place of their fused head and of their divergence."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chunked_ce.integrations.trl_forward import Fused, always_lazy, forward_of, heads_of
from chunked_ce.lazy.activity import during
from chunked_ce.lazy.head import LazyHead, Settings
from chunked_ce.lazy.logits import LazyLogits
from chunked_ce.lazy.soft_targets import divergence_loss

__all__ = ["install", "uninstall"]

_UTILS, _SFT, _DISTILLATION = (f"trl.trainer.{name}" for name in ("utils", "sft_trainer", "distillation_trainer"))
_TRAINERS = (*(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo")), _SFT, _DISTILLATION)
_FUSED, _DIVERGENCE = "add_fused_lm_head", "_chunked_divergence_loss"

# What this module relies on: functions of TRL with their first parameters.
_KNOWN = {
    (_UTILS, _FUSED): ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    (_DISTILLATION, _DIVERGENCE): (
        *("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight"),
        *("completion_mask", "beta", "num_items_in_batch"),
    ),
    (_DISTILLATION, "DistillationTrainer._get_last_hidden_state"): ("self", "unwrapped_model"),
    (_DISTILLATION, "DistillationTrainer._compute_loss"): ("self", "unwrapped_student"),
}


class _Name(NamedTuple):
    """A name of TRL that `install` has replaced."""

    owner: Any
    name: str
    theirs: Any
    ours: Any


_keywords: dict[str, Any] = {}  # of the heads
_replaced: list[_Name] = []
_builds_sft: ContextVar[bool] = ContextVar("builds_sft", default=False)


def install(**keywords: Any) -> None:
    """Compute the losses of TRL's trainers (1.15 and later) with this library, those that are built from now on.

    TRL's `add_fused_lm_head`, which the SFT, DPO, KTO, GRPO, RLOO and asynchronous GRPO trainers call, makes the
    model's head an `LMHead` instead, and the log-probabilities and statistics come from its lazy logits. These go
    through the model's own code, so that its softcap and scales are part of them. `DistillationTrainer` takes its
    divergence from the lazy logits of both models. The head is called as a module: LoRA on it, `LMHead.shard`, FSDP2
    and ZeRO-3 work. ``model(..., fused_lm_head=True)`` also takes a ``temperature`` in the shape of ``labels``.

    Trainers that exist already, and those that `uninstall` finds, stay as they are. Once is enough: a second call
    replaces the keywords.

    Args:
        keywords: those of `LMHead.wrap`, ``vocab`` excepted. ``z_loss`` and ``label_smoothing`` are terms of the
            training loss of `SFTTrainer`; to the others, which have no cross-entropy, they add nothing, and a warning
            says so after the first step.

    Raises:
        ImportError: TRL is not installed, or is older than 1.15: where its trainers take logits from the model,
            `LMHead.wrap` is all that they need.
        RuntimeError: this version of TRL has other functions than those that are known.
        ValueError, TypeError: a keyword is not as described.
    """
    if "vocab" in keywords:
        raise TypeError("vocab is not a keyword of install: a model's own LMHead, or LMHead.shard(model), has it")
    Settings(**keywords)
    _check_known()
    _keywords.clear()
    _keywords.update(keywords)
    if _replaced:
        return
    utils, sft, distillation = map(importlib.import_module, (_UTILS, _SFT, _DISTILLATION))
    theirs = getattr(utils, _FUSED)
    ours = _adds_fused_head(theirs, utils.FusedCausalLMOutput)
    for module in (*map(importlib.import_module, _TRAINERS), *_modules_with(_FUSED, theirs)):
        if vars(module).get(_FUSED) is theirs:
            _replace(module, _FUSED, ours)
        if module.__name__ in _TRAINERS and hasattr(module, "BaseTunerLayer"):
            _replace(module, "BaseTunerLayer", ())  # its instances on the head would be refused
    for trainer, change in ((distillation.DistillationTrainer, _with_heads), (sft.SFTTrainer, _as_sft)):
        _replace(trainer, "__init__", change(trainer.__init__))


def uninstall() -> None:
    """Undo `install`. Trainers that were built meanwhile keep this library's losses."""
    for owner, name, theirs, ours in _replaced:
        for module in (owner, *(_modules_with(name, ours) if name == _FUSED else ())):
            if vars(module).get(name) is ours:
                setattr(module, name, theirs)
    _replaced.clear()
    _keywords.clear()


def _check_known() -> None:
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError("chunked_ce.integrations.trl needs TRL 1.15 or later: pip install trl") from error
    if not hasattr(importlib.import_module(_UTILS), _FUSED):
        raise ImportError(
            f"TRL {trl.__version__} has no {_UTILS}.{_FUSED}, which came with 1.15. Trainers that take logits from the "
            "model need nothing but LMHead.wrap(model), such as all of those before 1.7 and SFTTrainer with "
            "loss_type='nll'; for the others, use TRL 1.15 or later"
        )
    for (module, path), known in _KNOWN.items():
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        names = tuple(inspect.signature(found).parameters) if callable(found) else ()
        if names[: len(known)] != known:
            has = f"takes ({', '.join(names)})" if names else "does not exist"
            raise RuntimeError(
                f"TRL {trl.__version__} is not known to this version of chunked_ce: {module}.{path} {has}, expected "
                f"({', '.join(known)})"
            )


def _modules_with(name: str, value: Any) -> list[types.ModuleType]:
    """The modules of TRL, loaded by now, that have imported ``value`` by ``name``."""
    modules = [module for path, module in sys.modules.items() if path.split(".")[0] == "trl" and module is not None]
    return [module for module in modules if vars(module).get(name) is value]


def _replace(owner: Any, name: str, ours: Any) -> None:
    _replaced.append(_Name(owner, name, vars(owner)[name], ours))
    setattr(owner, name, ours)


# ---- heads ----


def _head_class() -> Any:
    # By its name, because its module imports others of this folder.
    return importlib.import_module("chunked_ce.lm_head").LMHead


@functools.cache
def _fp32_head_class() -> Any:
    """A head whose product is in float32, outside autocast: TRL's ``cast_lm_head_to_fp32``."""

    head_class = _head_class()

    class Fp32Head(head_class):  # type: ignore[valid-type, misc]  # a class that is known when it is imported
        def __call__(self, input: Tensor) -> Any:
            with torch.autocast(input.device.type, enabled=False):
                return super().__call__(input.float())

    return Fp32Head


def _take_heads(model: nn.Module, kind: Any = None) -> bool:
    """Make the head of ``model`` an `LMHead` unless it is one; False, with a warning, if that cannot be."""
    if not heads_of(model):
        try:
            (kind or _head_class()).wrap(model, **_keywords)
        except ValueError as error:
            _refuse_adapter(model)
            warnings.warn(
                f"the loss of this {type(model).__name__} is left to TRL's own fused head: {error}. The keywords of "
                "install have no effect on it: give the model an nn.Linear as head, or call uninstall()",
                UserWarning,
                stacklevel=4,
            )
            return False
    return True


def _refuse_adapter(model: Any) -> None:
    """For a loss that is left to TRL, whose own check of this `install` has taken away."""
    if callable(getattr(model.get_output_embeddings(), "get_base_layer", None)):
        raise ValueError("TRL's own head would leave out the adapter on the head of this model")


# ---- log-probabilities ----


def _adds_fused_head(theirs: Callable[..., None], output_class: type) -> Callable[..., None]:
    """`add_fused_lm_head` with the statistics of lazy logits."""

    @functools.wraps(theirs)
    def add_fused_lm_head(
        model: nn.Module,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: Sequence[str] = ("log_probs",),
    ) -> None:
        kind = _take_cast_off(model) if cast_lm_head_to_fp32 else None
        if not _take_heads(model, kind):
            return theirs(model, temperature, cast_lm_head_to_fp32, outputs)
        fused = Fused(tuple(dict.fromkeys(("log_probs", *outputs))), temperature, _builds_sft.get(), output_class)
        model.forward = types.MethodType(forward_of(model, fused), model)

    return add_fused_lm_head


def _take_cast_off(model: Any) -> Any:
    """The kind of head that takes the place of the cast that TRL has put into the forward of this one."""
    head, kind = model.get_output_embeddings(), _fp32_head_class()
    if not isinstance(head, nn.Linear) or (isinstance(head, LazyHead) and not isinstance(head, kind)):
        raise ValueError(
            f"cast_lm_head_to_fp32 needs a plain nn.Linear as head, which was {type(head).__name__}: give the keywords "
            "of LMHead.wrap to install instead, leave adapters off the head, or set cast_lm_head_to_fp32=False"
        )
    vars(head).pop("forward", None)
    return kind


def _as_sft(theirs: Callable[..., None]) -> Callable[..., None]:
    """``SFTTrainer.__init__``, whose fused head has the terms."""

    @functools.wraps(theirs)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _builds_sft.set(True)
        try:
            theirs(self, *args, **kwargs)
        finally:
            _builds_sft.reset(token)
        if self.args.loss_type != "nll" and any(head.terms for head in heads_of(self.model)):
            raise ValueError(
                "z_loss and label_smoothing of the head need SFTConfig(loss_type='nll'), a cross-entropy, were given "
                f"with loss_type={self.args.loss_type!r}"
            )

    return __init__


# ---- divergences ----


class _Backbone(nn.Module):
    """A model whose last hidden state is its lazy logits, to put where TRL calls a backbone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._of = model.forward, model

    def base_model(self, **inputs: Any) -> types.SimpleNamespace:
        forward, model = self._of
        with always_lazy(model):
            logits = forward(**inputs).logits
        if not isinstance(logits, LazyLogits):
            raise NotImplementedError(
                f"the head of {type(model).__name__} computes its logits at once, because of a hook on it or an "
                "adapter that is no plain LoRA: the divergence is taken from hidden states. Take them off the head"
            )
        return types.SimpleNamespace(last_hidden_state=logits)

    model = base_model  # as TRL calls it for some models


def _with_heads(theirs: Callable[..., None]) -> Callable[..., None]:
    """``DistillationTrainer.__init__``, which takes the heads of both models, or of none."""

    @functools.wraps(theirs)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if self.teacher_model is None:  # a subclass has a loss of its own, from logits
            return
        if not all(_take_heads(model) for model in (self.teacher_model, self.model)):
            _refuse_adapter(self.model)
            return
        for head in heads_of(self.model):
            head.record.served.add("trl")
        # Of this trainer, so that it stays as it is after `uninstall`.
        self._get_last_hidden_state = _last_logits_of(self._get_last_hidden_state)
        self._compute_loss = _with_divergence(self._compute_loss)

    return __init__


def _last_logits_of(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``_get_last_hidden_state`` with lazy logits (batch, time, V) in the place of the states (batch, time, D)."""

    @functools.wraps(theirs)
    def _get_last_hidden_state(unwrapped_model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = getattr(unwrapped_model, "get_base_model", None)  # of a PEFT model
        model: Any = base() if callable(base) else unwrapped_model
        return theirs(_Backbone(model), *args, **kwargs)

    return _get_last_hidden_state


def _with_divergence(theirs: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``_compute_loss`` with the divergence of lazy logits in the place of TRL's."""
    module = importlib.import_module(_DISTILLATION)

    @functools.wraps(theirs)
    def _compute_loss(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        of_states = getattr(module, _DIVERGENCE)
        setattr(module, _DIVERGENCE, functools.partial(_divergence, of_states))
        try:
            return theirs(*args, **kwargs)
        finally:
            setattr(module, _DIVERGENCE, of_states)

    return _compute_loss


def _divergence(of_states: Callable[..., tuple[Any, ...]], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What TRL's ``of_states`` returns, from lazy logits in the place of hidden states."""
    call = inspect.signature(of_states).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    counted, num_items = given["completion_mask"] != 0, given["num_items_in_batch"]
    logits = given["student_hidden_states"], given["teacher_hidden_states"]
    student, teacher = (one / given["temperature"] for one in logits)
    with during(of_states):
        keywords = {"reduction": "sum", "return_stats": True}
        loss, stats = divergence_loss(student, teacher, float(given["beta"]), counted, **keywords)
    num_tokens = counted.sum()
    num_items = num_tokens.clamp(min=1) if num_items is None else num_items
    return loss / torch.as_tensor(num_items, device=loss.device), stats.entropy_sum, num_tokens
