"""`LMHead`: an output embedding whose logits are lazy while training."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import Unpack

from chunked_ce.checks import check_layer
from chunked_ce.head_report import Report, report_of
from chunked_ce.integrations.deepspeed_initialize import follow_deepspeed
from chunked_ce.integrations.trainer import follow_label_smoother, follow_trainer
from chunked_ce.lazy.activity import Record
from chunked_ce.lazy.autotp import autotp_of, is_autotp
from chunked_ce.lazy.bypass import warn_of_bypass
from chunked_ce.lazy.classes import in_front, without
from chunked_ce.lazy.colwise import (
    colwise_of,
    has_forward_of_a_style,
    other_style_of,
    set_class,
    sharding_of,
)
from chunked_ce.lazy.evaluation import purpose_of_call
from chunked_ce.lazy.head import Keywords, KeywordsWithVocab, LazyHead, Settings
from chunked_ce.lazy.layout import Layout
from chunked_ce.lazy.logits import LazyLogits
from chunked_ce.lazy.obstacles import Obstacle, obstacle_of_call
from chunked_ce.lazy.output_embeddings import AUTOTP, check_model, output_embeddings
from chunked_ce.lazy.source import Call
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.sharded.adapters import follow_adapter, unfollow_adapter
from chunked_ce.sharded.ddp import check_not_averaged
from chunked_ce.sharded.deepspeed import check_out_of_sight
from chunked_ce.sharded.fsdp_units import check_units, compute_dtype, make_unit, refuse_management
from chunked_ce.sharded.gradients import mark
from chunked_ce.sharded.mesh import sharding_over
from chunked_ce.sharded.model import shard_parameters, together, unshard_parameters
from chunked_ce.sharded.optimizers import follow_steps
from chunked_ce.sharded.rows import shardings_of
from chunked_ce.tracing import not_compiled, run_as_written

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LMHead"]

Model = TypeVar("Model", bound=nn.Module)

_EVALUATION = "in evaluation mode"
_FEATURES = ("in_features", "out_features")


class LMHead(LazyHead):
    """The linear layer from hidden states (..., D) to logits (..., V), which in training returns `LazyLogits`.

    It is an ``nn.Linear`` with the same parameters and state dict, and the same logits in evaluation. Each loss of the
    lazy logits is computed inside a call of the head of its own, so that an engine which shards parameters (ZeRO-3,
    FSDP2) gathers the head once for the loss, and releases it.

    Args:
        in_features: D.
        vocab_size: V.
        bias: whether there is one.
        options: how losses are computed (`ChunkOptions`).
        z_loss, label_smoothing: as in `linear_cross_entropy`, added to every cross-entropy of the lazy logits.
        softcap, logit_scale: as in `linear_cross_entropy`, part of the logits, in evaluation too.
        vocab: the vocabulary entries of this rank (`VocabShard`); the parameters hold only their rows, and the logits
            are always lazy.
        lazy: ``"auto"`` while training, and in evaluation for a `Trainer` that keeps the loss only, and in a forward
            with ``labels``; ``"always"`` in all of evaluation, with z_loss and label_smoothing.

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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Unpack[KeywordsWithVocab],
    ) -> None:
        in_features, vocab_size = check_layer(in_features, vocab_size, bias, device, dtype)
        settings = Settings(**keywords)
        rows = vocab_size if settings.vocab is None else settings.vocab.rows
        super().__init__(in_features, rows, bias=bias, device=device, dtype=dtype)
        self._settings, self._record = settings, Record()

    # ---- swapping it in ----

    @classmethod
    def wrap(cls, model: Model, module: str | None = None, **keywords: Unpack[KeywordsWithVocab]) -> Model:
        """Turn the output embedding of ``model`` into an `LMHead`, in place, and return the model.

        Only the module's class changes. It stays the same object, with its parameters, its hooks and its places in the
        model, so that tied weights stay tied. The output embedding is the module named ``module``; else the one that
        ``get_output_embeddings()`` returns; else ``model`` itself if it is an ``nn.Linear``; else the only
        ``nn.Linear`` as wide as the model's largest embedding. Tensor parallelism may shard it over the vocabulary,
        before or after: ``ColwiseParallel`` of torch or Transformers, or DeepSpeed's AutoTP.

        Args:
            model: may be wrapped by an adapter library or an engine.
            module: the name of the output embedding in ``model``, as ``named_modules`` gives it.
            keywords: those of `LMHead`.

        Raises:
            ValueError: no output embedding was found, or it is not a plain ``nn.Linear``, sharded or not.

        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> model = LMHead.wrap(model)
        >>> type(model[1]), type(LMHead.unwrap(model)[1])
        (<class 'chunked_ce.lm_head.LMHead'>, <class 'torch.nn.modules.linear.Linear'>)
        """
        heads = output_embeddings(model, module)
        for linear in heads:
            _check_wrappable(linear)
        settings = Settings(**keywords)
        for linear in heads:
            if settings.vocab is not None and not is_autotp(linear) and linear.out_features != settings.vocab.rows:
                raise ValueError(
                    f"vocab must hold as many words as the head, {linear.out_features}, held {settings.vocab.rows}"
                )
            cls._take(linear, settings)
        cls._follow_adapters(model, heads)
        return model

    @classmethod
    def shard(
        cls,
        model: Model,
        group_or_mesh: ProcessGroup | DeviceMesh | None = None,
        module: str | None = None,
        **keywords: Unpack[Keywords],
    ) -> Model:
        """Spread the output embedding of ``model`` over ranks that hold different tokens, and return the model.

        Each rank keeps its rows of the head's weight and bias, and of the embeddings tied to it. The head becomes an
        `LMHead` whose losses are those of this rank's tokens (``VocabShard(..., tokens="own")``), and is never
        gathered. Every rank of the group calls this, before the model goes into DDP, FSDP2 or DeepSpeed. State dicts
        hold whole tensors, and are taken on all ranks together.

        Args:
            model: may be wrapped by an adapter library.
            group_or_mesh: the ranks; None for all of them.
            module: the name of the output embedding in ``model``, as in `wrap`.
            keywords: those of `LMHead` without ``vocab``; a model's own `LMHead` keeps those that are not given.

        Raises:
            ValueError: no output embedding was found, it cannot be sharded, or it differs between the ranks.
        """
        groups = sharding_over(1, group_or_mesh).groups  # before heads are sought, which a rank may not find
        heads = together(groups, lambda: _heads_to_shard(model, module, keywords))
        shardings = [sharding_over(linear.out_features, group_or_mesh) for linear in heads]
        settings = [
            mine.replaced(vocab=sharding.vocab) for mine, sharding in zip(heads.values(), shardings, strict=True)
        ]
        follow_steps()
        follow_trainer()
        follow_deepspeed()
        for linear, sharding, its_settings in zip(heads, shardings, settings, strict=True):
            shard_parameters(model, linear, sharding)
            if isinstance(linear, LMHead):
                linear._settings = its_settings
            else:
                cls._take(linear, its_settings)
        for part in model.modules():
            make_unit(part)
        cls._follow_adapters(model, list(heads))
        return model

    @staticmethod
    def _follow_adapters(model: nn.Module, heads: list[nn.Linear]) -> None:
        for parent in model.modules():
            layer = getattr(parent, "base_layer", None)
            if isinstance(layer, LMHead) and layer in heads:
                follow_adapter(parent, layer)

    @classmethod
    def _take(cls, linear: nn.Linear, settings: Settings) -> None:
        layer = autotp_of(linear)
        if layer is not None:  # its parameters do not tell how it is sharded
            settings = settings.of_layout(layer)
            linear.in_features, linear.out_features = layer.in_features, layer.rows
        vars(linear).update(_settings=settings, _head_class=cls, _record=Record())
        follow_label_smoother()
        set_class(linear, in_front(cls, type(linear), nn.Linear, is_parametrized(linear)))

    @staticmethod
    def unwrap(model: Model) -> Model:
        """Undo `wrap`, in place, and return the model; a model without a wrapped head stays as it is.

        Undoes `shard` too: every rank of the group calls it, and has the whole parameters then.
        """
        check_model(model)
        for module in unshard_parameters(model):
            if isinstance(module, LMHead):
                module._settings = module._settings.replaced(vocab=None)
        heads = [module for module in model.modules() if "_head_class" in vars(module)]
        for head in heads:
            set_class(head, without(type(head), vars(head)["_head_class"], nn.Linear))
            for name in ("_head_class", "_settings", "_record", *(() if isinstance(head, nn.Linear) else _FEATURES)):
                vars(head).pop(name, None)
        for module in model.modules():
            unfollow_adapter(module)
        return model

    @staticmethod
    def report(model: nn.Module) -> Report:
        """What the heads of ``model`` are, whether their logits are lazy or why not, and what the last step did.

        It counts, for the calls since the optimizer's last step (or of that step), the losses and statistics that were
        taken without logits, and the logits that were computed all the same: for which operation, in which shape, and
        at which place of the code that asked.

        Returns:
            An object with a tuple ``heads``, and a text for people.

        Raises:
            ValueError: the model has no `LMHead`.

        >>> model = LMHead.wrap(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)), z_loss=0.5)
        >>> nn.CrossEntropyLoss()(model(torch.arange(3)), torch.arange(3)).backward()
        >>> print(LMHead.report(model))
        1 (plain): lazy
          settings: z_loss=0.5
          last training step: 1 call of the head
            without logits: cross_entropy (1 x)
        """
        check_model(model)
        return report_of(model)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "weight" and self.training and not torch.compiler.is_compiling():
            warn_of_bypass(self, sys._getframe(1))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if shardings_of(self):
            refuse_management(name)
        super().__setattr__(name, value)

    def set_deepspeed_parallelism(self, *_args: Any) -> None:
        check_out_of_sight(self)

    # ---- calls ----

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_always_lazy:
            return self._lazy_call(None, *args, **kwargs)
        purpose = purpose_of_call(self, _only(args, kwargs))
        if purpose is not None:
            return self._lazy_call(purpose, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.record.new_call(training=False).plain[_EVALUATION] += 1
        logits: Tensor = super().__call__(*args, **kwargs)
        return logits

    @not_compiled
    def _lazy_call(self, purpose: str | None, *args: Any, **kwargs: Any) -> Tensor:
        self._prepare_rows()
        hidden = _only(args, kwargs)
        obstacle = obstacle_of_call(self, hidden)
        if obstacle is not None:
            self._compute_at_once(obstacle)
            logits: Tensor = super().__call__(*args, **kwargs)
            return logits
        hidden = hidden if self.layout is None else self.layout.whole(hidden)
        hidden = hidden.to(compute_dtype(self) or hidden.dtype)
        self._count_call()
        return LazyLogits.of_call(Call(self, hidden, purpose=purpose), hidden, self.vocab_size, self._settings.logits)

    def can_add_low_rank(self, hidden: Any) -> bool:
        """Whether `with_low_rank` may take the place of the logits plus a low-rank product; a sharded head must."""
        if self.vocab is not None:
            return True
        if self.layout is not None or obstacle_of_call(self, hidden) is not None:
            return False
        return self.is_always_lazy or purpose_of_call(self, hidden) is not None

    @not_compiled
    def with_low_rank(self, hidden: Tensor, low_rank_hidden: Tensor, low_rank_weight: Tensor) -> LazyLogits:
        """The lazy logits plus the product of a low-rank adapter's factors (..., r) and (V_r, r)."""
        self._prepare_rows()
        if obstacle_of_call(self, hidden) is not None:
            self.check_can_compute("this call of the head")
        dtype = compute_dtype(self) or hidden.dtype
        joint = torch.cat([hidden.to(dtype), low_rank_hidden.to(dtype)], -1)
        if low_rank_weight.requires_grad and not joint.requires_grad:
            joint.requires_grad_()
        purpose = None if self.is_always_lazy else purpose_of_call(self, hidden)
        self._count_call()
        call = Call(self, joint, low_rank_weight, purpose)
        return LazyLogits.of_call(call, joint, self.vocab_size, self._settings.logits)

    def _prepare_rows(self) -> None:
        """What a call of a sharded head needs before it."""
        if shardings_of(self):
            mark(self)
            check_not_averaged(self)
            check_units(self)
            follow_steps()
            follow_trainer()

    def _count_call(self) -> None:
        self.record.new_call(self.training, self.terms if torch.is_grad_enabled() else "")

    def _compute_at_once(self, obstacle: Obstacle) -> None:
        """Count a call that computes its logits at once, and warn where that matters."""
        self.record.new_call(self.training).plain[obstacle.why] += 1
        because = f"because {obstacle.why}. {obstacle.remedy}"
        if self.layout is not None or is_dtensor(self.own_parameters()[0]):
            self.record.tell("sharded", f"an LMHead that is sharded over ranks computes its logits, {because}")
        elif self.terms and torch.is_grad_enabled():
            self.record.tell(
                "terms", f"{self.terms} of the head have no effect: it computes its logits at once, {because}"
            )


def _only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The only argument of a call, or None."""
    return args[0] if len(args) == 1 and not kwargs else kwargs.get("input") if len(kwargs) == 1 else None


def _heads_to_shard(model: nn.Module, name: str | None, keywords: Keywords) -> dict[nn.Linear, Settings]:
    """The linear layers that make the logits, with the settings that they will have but for the ranks."""
    if "vocab" in keywords:
        raise TypeError("vocab is not a keyword of LMHead.shard, which makes it from group_or_mesh")
    heads = output_embeddings(model, name)
    for linear in heads:
        if shardings_of(linear):
            raise ValueError("the output embedding is sharded already: LMHead.unwrap(model) undoes LMHead.shard")
        if not isinstance(linear, LMHead):
            _check_wrappable(linear)
        if _layout_of(linear) is not None:
            raise ValueError(
                "the output embedding is sharded by tensor parallelism, over ranks with the same tokens: "
                "LMHead.shard is for ranks with different tokens, and LMHead.wrap(model) takes it as it is"
            )
        if isinstance(linear, LMHead) and linear.vocab is not None:
            raise ValueError(
                "the output embedding is an LMHead that holds the rows of its vocab: build it without vocab"
            )
    return {
        linear: (linear._settings if isinstance(linear, LMHead) else Settings()).replaced(**keywords)
        for linear in heads
    }


def _layout_of(linear: nn.Linear) -> Layout | None:
    """How tensor parallelism has sharded a layer that may be a head."""
    return linear.layout if isinstance(linear, LMHead) else autotp_of(linear) or colwise_of(linear)


def _check_wrappable(linear: nn.Linear) -> None:
    if isinstance(linear, LMHead):
        raise ValueError("the output embedding is an LMHead already: LMHead.unwrap(model) undoes wrap")
    if autotp_of(linear) is not None:
        return
    if other_style_of(linear) is not None:
        raise ValueError(
            f"the output embedding must be sharded by ColwiseParallel, if at all, but {sharding_of(linear)}: a loss in "
            "chunks needs whole rows of the head on each rank"
        )
    own_forward = "forward" in vars(linear) and not has_forward_of_a_style(linear)
    if type(linear).forward is not nn.Linear.forward or own_forward:
        raise ValueError(
            f"the output embedding must compute what nn.Linear does, was {type(linear).__name__} with a forward of its "
            "own: wrap the model before anything replaces the forward"
        )


@run_as_written
def _new_place(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Runs when a module is put into another: what replaces a head becomes one, or a warning says that it does not.

    Resizing the embeddings of a model is one way to replace its head.
    """
    if isinstance(module, LMHead):
        follow_adapter(parent, module)
        return
    before = vars(parent)["_modules"].get(name)
    if module is None or not isinstance(before, LMHead):
        return
    is_like = type(module) is nn.Linear and module.in_features == before.in_features
    if (is_like or autotp_of(module) is not None) and before.vocab is None:
        vars(before).get("_head_class", LMHead)._take(module, before._settings)
        module.train(before.training)
    elif is_autotp(module):
        warnings.warn(
            f"DeepSpeed's AutoTP puts a {type(module).__name__} in the place of this LMHead, and losses of its logits "
            f"are no longer taken in chunks. {AUTOTP}",
            UserWarning,
            stacklevel=3,
        )
    elif not isinstance(module, nn.Identity) and before not in module.modules():  # as a head is inside an adapter
        warnings.warn(
            f"{type(module).__name__} takes the place of the LMHead {name!r}, and its logits are not lazy: call "
            "LMHead.wrap(model) once more, with the keywords of the first time",
            UserWarning,
            stacklevel=3,
        )


nn.modules.module.register_module_module_registration_hook(_new_place)
