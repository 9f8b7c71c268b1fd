"""`LMHead`: an output embedding whose logits are lazy while training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized

from chunked_ce.arguments import described, is_one_of
from chunked_ce.checks import check_keywords, check_layer, check_options, check_vocab
from chunked_ce.distributed.vocab import VocabShard
from chunked_ce.engine.tracing import not_compiled
from chunked_ce.lazy import consume, shapes  # noqa: F401  what lazy tensors follow
from chunked_ce.lazy.classes import TokenAdapter, in_front, joined, without
from chunked_ce.lazy.logits import LazyLogits
from chunked_ce.lazy.source import Call
from chunked_ce.objective import Logits
from chunked_ce.options import ChunkOptions

__all__ = ["LMHead"]

# Hooks that gather and release a module's parameters, and so belong around the loss as well as around logits.
_ENGINES = ("deepspeed", "torch.distributed.fsdp")

_AUTOTP = (
    "What works: AutoTP leaves the head alone (a partition_config that has no spec for it, or one that skips it), and "
    "LMHead.wrap(model) comes before or after it; or DeepSpeed's configuration sets vocab_parallel_lm_head of "
    "tensor_parallel, and linear_cross_entropy(hidden, layer.weight, target, vocab=VocabShard.from_deepspeed(layer)) "
    "takes the loss of the VocabParallelLinear that is the head then"
)


class LMHead(nn.Linear):
    """The linear layer from hidden states (..., D) to logits (..., V), which in training returns `LazyLogits`.

    To its users an ``nn.Linear``: the same parameters, the same state dict; in evaluation the same logits. A loss of
    the lazy logits is taken inside a call of the head of its own, so that an engine which shards parameters (ZeRO-3,
    FSDP2) gathers the head once for it, and releases it.

    Args:
        in_features: D.
        vocab_size: V.
        bias: whether there is one.
        options: how losses are computed (`ChunkOptions`).
        z_loss, label_smoothing: as in `linear_cross_entropy`, wherever a cross-entropy of the lazy logits is taken.
        softcap, logit_scale: as in `linear_cross_entropy`, part of the logits, in evaluation too.
        vocab: this rank's words (`VocabShard`), which the parameters then hold; the logits are always lazy.
        lazy: ``"auto"`` while training, ``"always"`` in evaluation too.

    Raises:
        ValueError, TypeError: a keyword is not as described.

    >>> import torch
    >>> head = LMHead(4, 10)
    >>> hidden, target = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    >>> loss = torch.nn.functional.cross_entropy(head(hidden).view(-1, 10), target.view(-1))
    >>> loss.backward()
    >>> type(head.eval()(hidden))
    <class 'torch.Tensor'>
    """

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        bias: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        in_features, vocab_size = check_layer(in_features, vocab_size, bias, device, dtype)
        settings = _Settings(**keywords)
        rows = vocab_size if settings.vocab is None else settings.vocab.rows
        super().__init__(in_features, rows, bias=bias, device=device, dtype=dtype)
        self._settings = settings

    # ---- swapping it in ----

    @classmethod
    def wrap(cls, model: nn.Module, module: str | None = None, **keywords: Any) -> LMHead:
        """Turn the output embedding of ``model`` into an `LMHead`, in place, and return it.

        The module stays the very object it was, with its parameters, hooks and places in the model, so that tied
        weights stay tied; only its class changes. It is the one that ``get_output_embeddings()`` names, or the one
        ``nn.Linear`` as wide as the model's embedding, or the one named ``module``.

        Args:
            model: also one that an adapter library or an engine wraps.
            module: the name of the output embedding in ``model``, as ``named_modules`` gives it.
            keywords: those of `LMHead`.

        Raises:
            ValueError: no output embedding was found, or it is not a plain ``nn.Linear``.

        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> head = LMHead.wrap(model)
        >>> head is model[1], LMHead.unwrap(model), type(model[1])
        (True, 1, <class 'torch.nn.modules.linear.Linear'>)
        """
        heads = _output_embeddings(model, module)
        for linear in heads:
            _check_wrappable(linear)
        made = [_Settings(**keywords) for _ in heads]
        for linear, settings in zip(heads, made, strict=True):
            if settings.vocab is not None and linear.out_features != settings.vocab.rows:
                raise ValueError(
                    f"vocab must hold as many words as the head, {linear.out_features}, held {settings.vocab.rows}"
                )
            cls._take(linear, settings)
        for module in model.modules():
            if getattr(module, "base_layer", None) in heads:
                _follow_token_adapter(module)
        return heads[0]

    @classmethod
    def _take(cls, linear: nn.Linear, settings: _Settings) -> None:
        linear._settings, linear._head_class = settings, cls
        linear.__class__ = in_front(cls, type(linear), nn.Linear, is_parametrized(linear))

    @staticmethod
    def unwrap(model: nn.Module) -> int:
        """Undo `wrap`; the number of heads that were turned back."""
        found = [module for module in model.modules() if "_head_class" in vars(module)]
        for head in found:
            head.__class__ = without(type(head), head._head_class, nn.Linear)
            del head._head_class, head._settings
        for module in model.modules():
            if isinstance(module, TokenAdapter):
                module.__class__ = without(type(module), TokenAdapter, nn.Module)
        return len(found)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "replaced" and value and not _skipped_by_autotp(sys._getframe(1)):
            warnings.warn(
                "DeepSpeed's AutoTP puts a layer of its own in the place of this LMHead, and losses of its logits are "
                f"no longer taken in chunks. {_AUTOTP}",
                UserWarning,
                stacklevel=2,
            )
        super().__setattr__(name, value)

    # ---- calls ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._settings
        if not self.training and settings.lazy != "always" and settings.vocab is None:
            return super().__call__(*args, **kwargs)
        return self._lazy_call(*args, **kwargs)

    @not_compiled
    def _lazy_call(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if len(args) == 1 and not kwargs else kwargs.get("input") if len(kwargs) == 1 else None
        if not self._can_be_lazy(hidden):
            return super().__call__(*args, **kwargs)
        return LazyLogits.of_call(Call(self, hidden), hidden, self.vocab_size, self._settings.logits)

    def _can_be_lazy(self, hidden: Any) -> bool:
        """Whether the logits can wait: nothing but the loss needs to see them, and the loss can be taken later."""
        return (
            type(hidden) in (Tensor, nn.Parameter)
            and hidden.is_floating_point()
            and not hidden.is_meta
            and hidden.shape[-1:] == (self.in_features,)
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and type(self).forward is LMHead.forward
            and "forward" not in vars(self)
            and self.own_parameters()[0] is not None
            and (not _is_dtensor(self.own_parameters()[0]) or _is_fsdp(self))
            and all(_is_engines(hook) for hook in self._hooks())
        )

    def _hooks(self) -> Iterator[Callable]:
        """What is called around a call of this module, or of every module."""
        kinds = ("forward_pre_hooks", "forward_hooks", "backward_hooks", "backward_pre_hooks")
        for kind in kinds:
            yield from getattr(self, f"_{kind}").values()
            yield from getattr(nn.modules.module, f"_global_{kind}").values()

    def run(self, hidden: Tensor, request: Callable[..., Any]) -> Any:
        """``request(hidden, weight, bias)`` inside a call of this module, with all that hangs on one."""
        return super().__call__(hidden, request=request)

    def forward(self, input: Tensor, request: Callable[..., Any] | None = None) -> Any:
        if request is not None:
            self.check_whole(self.weight, self.bias)
            return request(input, self.weight, self.bias)
        if self.vocab is not None:
            self.check_can_compute("this call of the head")
        return self.logits_of(input, self.weight, self.bias, self._settings.logits)

    @staticmethod
    def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits) -> Tensor:
        return logits(F.linear(hidden, weight, bias))

    # ---- what lazy logits ask ----

    def own_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as they are, gathered or not; a weight that is not a parameter (parametrized) is None."""
        # The copies that a replica of `nn.DataParallel` has of them are attributes.
        attributes = vars(self) if getattr(self, "_is_replica", False) else {}
        return tuple(dict.get(self._parameters, name, attributes.get(name)) for name in ("weight", "bias"))

    @property
    def options(self) -> ChunkOptions | None:
        return self._settings.options

    @property
    def vocab_size(self) -> int:
        """All words there are now: a weight may have been resized since the head was made."""
        weight, _ = self.own_parameters()
        return _whole_shape(weight)[0] if self.vocab is None else self.vocab.total

    @property
    def vocab(self) -> VocabShard | None:
        return self._settings.vocab

    @property
    def loss_keywords(self) -> dict[str, float]:
        """What the head adds to every loss."""
        return {"z_loss": self._settings.z_loss, "label_smoothing": self._settings.label_smoothing}

    def keywords_of_loss(self, label_smoothing: float) -> dict[str, Any]:
        """Keywords for a loss that was asked for with ``label_smoothing``."""
        mine = self._settings.label_smoothing
        if label_smoothing and mine and label_smoothing != mine:
            raise ValueError(
                f"label_smoothing: the loss was given {label_smoothing}, the head {mine}: give it to one of them"
            )
        return {
            "label_smoothing": label_smoothing or mine,
            "z_loss": self._settings.z_loss,
            "options": self._settings.options,
        }

    def is_whole(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the parameters are all there: no engine has them released or sharded."""
        here = not _is_dtensor(weight) and weight.shape == _whole_shape(weight)
        return here and (weight.numel() == 0 or weight.untyped_storage().nbytes() > 0)

    def check_whole(self, weight: Tensor, bias: Tensor | None) -> None:
        if not self.is_whole(weight, bias):
            raise RuntimeError(
                f"the head's weight, of shape {tuple(_whole_shape(weight))}, is not whole here but "
                f"{type(weight).__name__} {tuple(weight.shape)}: a loss outside the forward of the module that an "
                "engine shards needs the head to be a unit of its own (fully_shard(model.lm_head)), or the loss must "
                "move into the forward (pass labels to the model)"
            )

    def check_can_compute(self, operation: str) -> None:
        if self.vocab is not None:
            raise NotImplementedError(
                f"{operation} needs the logits of all words, of which this rank holds {self.vocab.rows} of "
                f"{self.vocab.total} (vocab): only losses and log-probabilities are taken from a sharded head"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{self._settings}"


class _Settings:
    """The keywords of a head, checked."""

    def __init__(
        self,
        *,
        options: ChunkOptions | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        vocab: VocabShard | None = None,
        lazy: Literal["auto", "always"] = "auto",
        **others: Any,
    ) -> None:
        if others:
            raise TypeError(
                f"{next(iter(others))} is not a keyword of a head: its losses take reduction, ignore_index and weight "
                "where they are called; allowed are options, z_loss, label_smoothing, softcap, logit_scale, vocab, lazy"
            )
        check_keywords(label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
        check_options(options, None)
        check_vocab(vocab)
        if not is_one_of(lazy, ("auto", "always")):
            raise ValueError(f"lazy must be 'auto' or 'always', was {described(lazy)}")
        self.options, self.z_loss, self.label_smoothing = options, float(z_loss), float(label_smoothing)
        self.logits = Logits(float(logit_scale), None if softcap is None else float(softcap))
        self.vocab, self.lazy = vocab, lazy

    def __str__(self) -> str:
        said = {"options": self.options, "z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
        said |= {"softcap": self.logits.softcap, "vocab": self.vocab}
        said |= {"logit_scale": self.logits.scale if self.logits.scale != 1 else None}
        said |= {"lazy": self.lazy if self.lazy != "auto" else None}
        return "".join(f", {name}={value}" for name, value in said.items() if value)


def _output_embeddings(model: nn.Module, name: str | None) -> list[nn.Linear]:
    """The linear layers that make the logits; several where an adapter library keeps copies of one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, was {type(model).__name__}")
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"module must be None or the name of a module of the model, was {described(name)}")
        try:
            return _linears_of(model.get_submodule(name))
        except AttributeError as error:
            raise ValueError(f"module must name a module of the model, was {name!r}") from error
    for candidate in model.modules():
        found = getattr(candidate, "get_output_embeddings", None)
        found = found() if callable(found) else None
        if isinstance(found, nn.Module):
            return _linears_of(found)
    linears = {named: one for named, one in model.named_modules() if isinstance(one, nn.Linear)}
    words = max((one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding)), default=None)
    fitting = {named: one for named, one in linears.items() if one.out_features == words}
    if len(fitting) != 1:
        raise ValueError(
            f"no output embedding found: the model has no get_output_embeddings(), and {len(fitting)} of its linear "
            f"layers have the {words} outputs of its largest embedding ({', '.join(fitting) or 'none'}): name it, "
            "LMHead.wrap(model, 'lm_head')"
            + (f". DeepSpeed's AutoTP has replaced layers of this model. {_AUTOTP}" if _has_autotp(model) else "")
        )
    return list(fitting.values())


def _linears_of(module: nn.Module) -> list[nn.Linear]:
    """The layers themselves, below what an adapter library puts around them."""
    if isinstance(module, nn.Linear):
        return [module]
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return [linear for copy in (*copies.values(), module.original_module) for linear in _linears_of(copy)]
    if isinstance(getattr(module, "token_adapter", None), nn.Module):  # PEFT's trainable tokens
        module = module.token_adapter
    if callable(getattr(module, "get_base_layer", None)):
        return _linears_of(module.get_base_layer())
    pointer = f" of DeepSpeed's AutoTP. {_AUTOTP}" if _is_autotp(module) else ""
    raise ValueError(f"the output embedding must be an nn.Linear, was {type(module).__name__}{pointer}")


def _has_autotp(model: nn.Module) -> bool:
    return any(map(_is_autotp, model.modules()))


def _is_autotp(module: nn.Module) -> bool:
    # None of its layers exist while its module, which is slow to import, is not imported.
    layers = sys.modules.get("deepspeed.module_inject.layers")
    return layers is not None and isinstance(module, layers.TensorParallel_Layer)


def _skipped_by_autotp(caller: FrameType) -> bool:
    """Whether AutoTP marks a layer as replaced because it is told to leave it as it is."""
    kind = getattr(caller.f_locals.get("spec"), "partition_type", None)
    return getattr(kind, "name", None) == "SKIP"


def _check_wrappable(linear: nn.Linear) -> None:
    if isinstance(linear, LMHead):
        raise ValueError("the output embedding is an LMHead already: LMHead.unwrap(model) undoes wrap")
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise ValueError(
            f"the output embedding must compute what nn.Linear does, was {type(linear).__name__} with a forward of its "
            "own: wrap the model before anything replaces the forward"
        )


def _follow_token_adapter(module: nn.Module) -> None:
    """PEFT's trainable tokens, in front of a head, leave it lazy."""
    peft = sys.modules.get("peft.tuners.trainable_tokens.layer")
    if peft is not None and isinstance(module, peft.TrainableTokensLayer) and not isinstance(module, TokenAdapter):
        module.__class__ = joined(TokenAdapter, type(module))


def _new_place(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Called when a module is put into another: what comes in place of a head is one too, or a warning says it is not.

    Resizing the embeddings of a model is one way to replace its head.
    """
    if isinstance(module, LMHead):
        _follow_token_adapter(parent)
        return
    before = vars(parent)["_modules"].get(name)
    if module is None or not isinstance(before, LMHead) or _is_autotp(module):  # of which a warning has told already
        return
    if type(module) is nn.Linear and module.in_features == before.in_features and before.vocab is None:
        vars(before).get("_head_class", LMHead)._take(module, before._settings)
        module.train(before.training)
    elif not isinstance(module, nn.Identity) and before not in module.modules():  # as it is inside of an adapter
        warnings.warn(
            f"{type(module).__name__} takes the place of the LMHead {name!r}, and its logits are not lazy: call "
            "LMHead.wrap(model) once more, with the keywords of the first time",
            UserWarning,
            stacklevel=3,
        )


nn.modules.module.register_module_module_registration_hook(_new_place)


def _whole_shape(weight: Tensor) -> torch.Size:
    """(V, D), also while ZeRO-3 has an empty tensor in the place of the weight."""
    return getattr(weight, "ds_shape", weight.shape)


def _is_engines(hook: Callable) -> bool:
    module = getattr(hook, "__module__", None) or ""
    return any(module == engine or module.startswith(engine + ".") for engine in _ENGINES)


def _is_dtensor(value: object) -> bool:
    # No DTensor exists while its module, which is slow to import, is not imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
