"""The head behind lazy logits: its settings, its parameters as they are now, and a call of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from chunked_ce.arguments import described, is_one_of
from chunked_ce.checks import check_keywords, check_options, check_vocab
from chunked_ce.lazy.activity import Record
from chunked_ce.lazy.colwise import colwise_of
from chunked_ce.lazy.layout import Layout, LayoutWithForward
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.parallel.fsdp import is_fsdp_shard
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.statistics import Logits

__all__ = ["Keywords", "KeywordsWithVocab", "LazyHead", "Settings", "check_whole", "is_whole"]


class Keywords(TypedDict, total=False):
    """The keywords of a head, for type checkers, but for its shard of the vocabulary."""

    options: ChunkOptions | None
    z_loss: float
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    lazy: Literal["auto", "always"]


class KeywordsWithVocab(Keywords, total=False):
    """All of them."""

    vocab: VocabShard | None


class Settings:
    """The keywords of a head, checked."""

    layout: LayoutWithForward | None = None

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

    def replaced(self, **keywords: Any) -> Settings:
        """These settings with ``keywords`` in the place of their own."""
        mine = {name: getattr(self, name) for name in ("options", "z_loss", "label_smoothing", "vocab", "lazy")}
        return Settings(**(mine | {"softcap": self.logits.softcap, "logit_scale": self.logits.scale} | keywords))

    def of_product(self) -> Settings:
        """The same for a head whose logits are its product, without scale and softcap."""
        settings = copy.copy(self)
        settings.logits = Logits()
        return settings

    def of_layout(self, layout: LayoutWithForward) -> Settings:
        """The same for a head that is sharded as ``layout`` says."""
        if self.vocab is not None:
            raise ValueError(f"vocab must be left out for a head that a tensor-parallel layer shards, was {self.vocab}")
        settings = copy.copy(self)
        settings.layout, settings.vocab = layout, layout.vocab
        return settings

    def __str__(self) -> str:
        shown = {
            "options": self.options,
            "z_loss": self.z_loss,
            "label_smoothing": self.label_smoothing,
            "softcap": self.logits.softcap,
            "vocab": self.vocab,
            "logit_scale": self.logits.scale if self.logits.scale != 1 else None,
            "lazy": self.lazy if self.lazy != "auto" else None,
        }
        return "".join(f", {name}={value}" for name, value in shown.items() if value)


class LazyHead(nn.Linear):
    """The part of an `LMHead` that its lazy logits rely on."""

    _settings: Settings

    def run(self, hidden: Tensor, request: Callable[..., Any]) -> Any:
        """``request(hidden, weight, bias)`` inside a call of this module, so that all of its hooks run."""
        layout = self.layout
        called = self if layout is None else layout.without_its_steps(self)
        return super(LazyHead, called).__call__(hidden, request=request)

    def forward(self, input: Tensor, request: Callable[..., Any] | None = None) -> Any:
        if request is not None:
            if self.vocab is None:
                check_whole(self.weight)
            return tree_map(_own, request(input, self.weight, self.bias))
        layout = self._settings.layout
        if layout is not None:
            return self._settings.logits(layout.forward(self, input))
        if self.vocab is not None:
            self.check_can_compute("this call of the head")
        return self._settings.logits(F.linear(input, self.weight, self.bias))

    def own_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as they are, gathered or not; None for a weight that is not a parameter (parametrized)."""
        # They are attributes in a replica that `nn.DataParallel` makes, and where DeepSpeed shall not see them.
        parameters, attributes = self._parameters, vars(self)
        weight = dict.get(parameters, "weight", attributes.get("weight"))
        return weight, dict.get(parameters, "bias", attributes.get("bias"))

    @property
    def record(self) -> Record:
        """What has happened in its calls, shared with the replicas of `nn.DataParallel`."""
        found: Record = vars(self).get("_record") or vars(self).setdefault("_record", Record())
        return found

    @property
    def options(self) -> ChunkOptions | None:
        return self._settings.options

    @property
    def vocab(self) -> VocabShard | None:
        return self._settings.vocab

    @property
    def layout(self) -> Layout | None:
        """How a tensor-parallel layer has sharded the head, if one has."""
        return self._settings.layout or colwise_of(self)

    @property
    def is_always_lazy(self) -> bool:
        """Whether logits wait in the mode that the head is in, whatever they are for."""
        has_rows_only = self.vocab is not None and self._settings.layout is None
        return self.training or self._settings.lazy == "always" or has_rows_only

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds the rows of some words only."""
        return self.vocab is not None or self.layout is not None

    @property
    def has_all_words(self) -> bool:
        """Whether the logits of all words may be computed on this rank."""
        return self.vocab is None if self.layout is None else self.layout.has_all_words

    @property
    def vocab_size(self) -> int:
        """The size of the whole vocabulary now: a weight may have been resized since the head was made."""
        if self.vocab is not None:
            return self.vocab.total
        weight, _ = self.own_parameters()
        assert weight is not None  # a head without one computes its logits at once
        return _whole_shape(weight)[0]

    @property
    def loss_keywords(self) -> dict[str, float]:
        """The terms that the head adds to every cross-entropy."""
        return {"z_loss": self._settings.z_loss, "label_smoothing": self._settings.label_smoothing}

    @property
    def terms(self) -> str:
        """The same in words; empty if there are none."""
        return " and ".join(f"{name}={value}" for name, value in self.loss_keywords.items() if value)

    def keywords_of_loss(self, label_smoothing: float) -> dict[str, Any]:
        """The keywords of a cross-entropy that the caller asked for with ``label_smoothing``."""
        mine = self._settings.label_smoothing
        if label_smoothing and mine and label_smoothing != mine:
            raise ValueError(
                f"label_smoothing: the loss was given {label_smoothing}, the head {mine}: give it to one of them"
            )
        return self.loss_keywords | {"label_smoothing": label_smoothing or mine, "options": self.options}

    def check_can_compute(self, operation: str) -> None:
        if self.has_all_words:
            return
        held = f"some of {self.vocab_size}" if self.vocab is None else f"{self.vocab.rows} of {self.vocab.total}"
        is_own = self.vocab is not None and self.vocab.tokens == "own"
        whole = ". LMHead.unwrap(model), on every rank, makes it whole" if is_own else ""
        raise NotImplementedError(
            f"{operation} needs the logits of all words, of which this rank holds {held} (vocab): only losses, "
            f"log-probabilities and statistics such as entropies are taken from a sharded head{whole}"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{self._settings}"


def _own(x: Any) -> Any:
    """A view as a tensor of its own: FSDP2 warns of a module that returns a view with a graph."""
    is_view = isinstance(x, Tensor) and x.requires_grad and x._base is not None
    return x.clone() if is_view and torch.is_grad_enabled() else x


def is_whole(weight: Tensor) -> bool:
    """Whether the weight of a head is all there: no engine has released or sharded it."""
    is_local = not is_dtensor(weight) and weight.shape == _whole_shape(weight)
    return is_local and (weight.numel() == 0 or weight.untyped_storage().nbytes() > 0)


def check_whole(weight: Tensor) -> None:
    if not is_whole(weight) and (not is_dtensor(weight) or is_fsdp_shard(weight)):
        raise RuntimeError(
            f"the head's weight, of shape {tuple(_whole_shape(weight))}, is not whole here but "
            f"{type(weight).__name__} {tuple(weight.shape)}: a loss outside the forward of the module that an "
            "engine shards needs the head to be a unit of its own (fully_shard(model.lm_head)), or the loss must "
            "move into the forward (pass labels to the model)"
        )


def _whole_shape(weight: Tensor) -> torch.Size:
    """(V, D), also while ZeRO-3 has put an empty tensor in the weight's place."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape
