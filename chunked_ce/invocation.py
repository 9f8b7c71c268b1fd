"""From the arguments of a public function to the engine: tensors by name, checks on all ranks, and the call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.arguments import ADAPTER, plain_integer
from chunked_ce.checks import check_call, compute_dtype_of, described_objective
from chunked_ce.depths import (
    are_depths,
    check_widths,
    check_with_depths,
    depths_of,
    for_each_depth,
    in_shapes,
    joined_depths,
)
from chunked_ce.engine import dispatch
from chunked_ce.engine.call import Call
from chunked_ce.engine.ignored_tokens import with_ignored
from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.engine.specification import TEMPERATURE, Specification
from chunked_ce.invariance import check_invariance
from chunked_ce.keywords import PerToken
from chunked_ce.narrowing import not_none
from chunked_ce.objectives import Objective, Teacher
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.agreement import agreed, facts_of_call
from chunked_ce.parallel.dtensors import has_dtensor, local_arguments
from chunked_ce.parallel.meeting import shared_errors
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.plan import Settings
from chunked_ce.reductions import MEAN, marked
from chunked_ce.rows.statistics import Logits, names_of, work_dtype
from chunked_ce.teachers import check_teacher, facts_of_teacher, of_this_rank, product_dtype

__all__ = ["Arguments", "agreed_on", "call_of", "loss_of"]


_Objective = TypeVar("_Objective", bound=Objective | None)


class Arguments(NamedTuple):
    """The arguments of one call as its user gave them, by name."""

    function: str
    tensors: dict[str, Any]  # "input", "linear_weight" and "linear_bias", or "logits", and those of the loss
    keywords: dict[str, Any]
    vocab: VocabShard | None
    options: ChunkOptions | None
    flags: dict[str, bool]
    teacher: Teacher | None = None
    shapes: list[torch.Size] | None = None  # of each depth's tokens, once these are joined
    targets: list[Tensor] | None = None  # of each depth, once these are joined

    @classmethod
    def of(
        cls,
        function: str,
        tensors: dict[str, Any],
        keywords: dict[str, Any],
        vocab: VocabShard | None,
        options: ChunkOptions | None,
        flags: dict[str, bool],
        teacher: Teacher | None = None,
    ) -> Arguments:
        """The arguments, with a temperature of each token and the factors of an adapter among the tensors."""
        tensors, temperature = dict(tensors), keywords["temperature"]
        if isinstance(temperature, Tensor) or are_depths(temperature):
            tensors["temperature"], keywords = temperature, keywords | {"temperature": 1.0}
        adapter = tensors.pop("linear_adapter", None)
        if isinstance(adapter, list | tuple) and len(adapter) == 2:
            tensors |= dict(zip(ADAPTER, adapter, strict=True))
        elif adapter is not None:
            tensors["linear_adapter"] = adapter  # which is refused where arguments are checked
        return cls(function, tensors, keywords, vocab, options, flags, teacher)

    @property
    def is_head(self) -> bool:
        return "linear_weight" in self.tensors

    @property
    def input(self) -> Tensor:
        """The hidden states, of the first depth if there are several, or the logits."""
        given = self.tensors["input" if self.is_head else "logits"]
        input: Tensor = given[0] if are_depths(given) and len(given) > 0 else given
        return input

    @property
    def has_depths(self) -> bool:
        return self.is_head and are_depths(self.tensors["input"])

    def shaped(self, values: Tensor) -> Tensor | list[Tensor]:
        """``values`` (N,) of all tokens in the shape of the target, or in those of its depths."""
        if self.shapes is not None:
            return in_shapes(values, self.shapes)
        shape: torch.Size = self.tensors["target"].shape
        return values.view(shape)

    def joined(self, per_token: Collection[str] = ()) -> Arguments:
        """With the small tensors per token of several depths joined, and their hidden states as lists."""
        if not self.has_depths:
            return self
        tensors, shapes = joined_depths(depths_of(self.tensors, per_token), per_token)
        return self._replace(tensors=tensors, shapes=shapes, targets=list(self.tensors["target"]))

    @property
    def vocab_size(self) -> int:
        """Vocabulary entries that this rank is given."""
        entries: int = self.tensors["linear_weight"].shape[0] if self.is_head else self.input.shape[-1]
        return entries

    def shared_errors(self) -> AbstractContextManager[None]:
        """Between the comparison of calls and the engine, which starts with a meeting of ranks where the host waits."""
        vocab, device = self.vocab, self.input.device
        if vocab is None or torch.compiler.is_compiling():
            return nullcontext()
        waits = vocab.tokens == "own" or device.type == "cpu"
        return shared_errors(not_none(vocab.group), device) if waits else nullcontext()

    def local(self) -> Arguments:
        """What this rank needs of DTensors, and the shard that they say that it holds."""
        if not has_dtensor((*self.tensors.values(), self.keywords.get("num_tokens"))):
            return self
        tensors = dict(self.tensors)
        name = "linear_weight" if self.is_head else "logits"
        numbers = {"num_tokens": self.keywords["num_tokens"]} if "num_tokens" in self.keywords else {}
        sharded, vocab, given = local_arguments(name, tensors.pop(name), self.vocab, **tensors, **numbers)
        tensors = {key: sharded if key == name else given[key] for key in self.tensors}
        keywords = self.keywords | {key: given[key] for key in numbers}
        return self._replace(tensors=tensors, keywords=keywords, vocab=vocab)


def loss_of(
    objective_of: Callable[[], Objective], arguments: Arguments, per_token: Mapping[str, PerToken | None] | None = None
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], LossStats]:
    loss: Tensor | list[Tensor]
    per_token = per_token or {}
    if per_token:
        given = {name: tensor for name, tensor in per_token.items() if tensor is not None}
        arguments = arguments._replace(tensors=arguments.tensors | given)
    arguments = arguments.local()
    options, objective = agreed_on(objective_of, arguments, per_token)
    arguments = arguments.joined(per_token)
    tensors, keywords, return_stats = arguments.tensors, arguments.keywords, arguments.flags["return_stats"]
    reduction = keywords["reduction"]
    asked = objective.statistics + (("mean", "correct") if return_stats else ())
    with arguments.shared_errors():
        call = call_of(arguments, options, objective.without_tensors(), names_of(asked))
        weights = dispatch.TokenWeights.of(call, tensors["token_weight"])
        joined = {name: tensors[name] for name, tensor in per_token.items() if tensor is not None}
        flat = {name: _of_tokens(objective, name, tensor) for name, tensor in joined.items()}
        call = call.with_per_token(call.per_token | flat, ids=objective.ids)
        coefficient = weights.coefficient(reduction, keywords["num_tokens"])
    in_forward = arguments.is_head and not options.in_backward
    loss, rows = dispatch.loss(call, coefficient, in_forward=in_forward, reduces=reduction != "none")
    loss = arguments.shaped(loss) if reduction == "none" else marked(loss, MEAN) if reduction == "mean" else loss
    return (loss, dispatch.stats(call, weights, rows)) if return_stats else loss


def _of_tokens(objective: Objective, name: str, tensor: Tensor) -> Tensor:
    """A tensor per token of an objective, (N,), or (N, K) with K ids per token."""
    if name not in (objective.ids, *objective.per_id):
        return tensor.reshape(-1)
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor.long() if name == objective.ids else tensor


def agreed_on(
    objective_of: Callable[[], _Objective], arguments: Arguments, per_token: Mapping[str, Any]
) -> tuple[ChunkOptions, _Objective]:
    """The checked options and objective of a call, on every rank that takes part in it."""
    tensors, keywords, vocab, options = arguments.tensors, arguments.keywords, arguments.vocab, arguments.options

    def check() -> tuple[ChunkOptions, _Objective]:
        objective = objective_of()
        transformed = dispatch.is_transformed(None)

        def check_depth(tensors: dict[str, Any]) -> ChunkOptions:
            return check_call(tensors, keywords, vocab, options, arguments.flags, objective, per_token, transformed)

        depths = depths_of(tensors, per_token)
        if len(depths) > 1:
            check_with_depths(len(depths), arguments.teacher, vocab)
        (checked, *_) = for_each_depth(depths, check_depth)
        if len(depths) > 1:
            check_widths(depths, per_token)
        shape, device = depths[0]["target"].shape, arguments.input.device
        check_teacher(arguments.teacher, objective, shape, device, arguments.vocab_size, vocab)
        check_invariance(checked, depths[0], vocab, arguments.teacher, transformed)
        dispatch.is_transformed(vocab)
        return checked, objective

    def facts(result: tuple[ChunkOptions, _Objective]) -> dict[str, Any]:  # on ranks that share a vocabulary
        depths = depths_of(tensors, per_token)
        facts = {"function": arguments.function, "options": options, "depths": len(depths)} | arguments.flags
        for at, depth in enumerate(depths):
            found = facts_of_call(depth, keywords, compute_dtype_of(arguments.input), not_none(vocab))
            facts |= found if at == 0 else {f"{name} (depth {at})": fact for name, fact in found.items()}
        facts, objective = facts | facts_of_teacher(arguments.teacher, not_none(vocab)), result[1]
        return facts if objective is None else facts | {"objective": described_objective(objective)}

    return agreed(check, facts, vocab, getattr(arguments.input, "device", None))


def call_of(
    arguments: Arguments,
    options: ChunkOptions,
    objective: Objective | None,
    names: tuple[str, ...],
) -> Call:
    """What the engine is given: flat tensors, this rank's rows without padding, and the specification."""
    tensors, keywords, vocab = arguments.tensors, arguments.keywords, arguments.vocab
    input, target = arguments.input, tensors["target"]
    parts: tuple[str, ...]
    needed: tuple[bool, ...]
    logits, temperature, of_teacher = _logits(arguments)
    shard = None if vocab is None else vocab.plain()
    if arguments.is_head:
        settings = dispatch.settings_of(options, input, tensors["linear_weight"], compute_dtype_of(input), vocab)
        parts, source = _head(tensors, vocab)
        # Several depths, or tokens whose number other ranks know: a sum over chunks is wide, however many these are.
        if parts[1] == "hidden" or (vocab is not None and vocab.tokens == "own"):
            settings = settings._replace(head_sum_dtype=settings.wide_dtype)
        if "adapter_weight" in parts:  # whose gradients would need the columns that a filter drops
            settings = settings._replace(gradient_filter=None)
        needed = tuple([part.requires_grad and torch.is_grad_enabled() for part in source])
    else:
        settings, parts, needed = Settings.of(options, input.dtype, input.device.type), ("logits",), ()
        unpadded = input if vocab is None else input[..., : vocab.rows]
        source = [unpadded.reshape(target.numel(), unpadded.shape[-1])]
    settings = settings._replace(teacher_dtype=product_dtype(arguments.teacher, vocab))
    classes = tensors["weight"]
    if classes is not None:
        classes = classes.to(work_dtype(settings.compute_dtype))
        classes = classes if vocab is None else vocab.whole_vocabulary(classes)
    kind = "head" if arguments.is_head else "logits"
    specification = Specification(kind, names, logits, settings, shard, parts, needed, objective)
    flat = devices.moved(target.reshape(-1).long(), input.device)
    call = Call(source, classes, flat, plain_integer(keywords["ignore_index"]), specification)
    if arguments.teacher is not None:
        call = call.with_teacher(*of_this_rank(arguments.teacher, vocab, of_teacher, not_none(objective).teacher_share))
    if temperature is not None:
        call = call.with_per_token({TEMPERATURE: temperature.reshape(-1).to(work_dtype(settings.compute_dtype))})
    targets = arguments.targets or [target]
    return with_ignored(call, options.ignored, targets, transformed=dispatch.is_transformed(None))


def _head(tensors: dict[str, Any], vocab: VocabShard | None) -> tuple[tuple[str, ...], list[Tensor]]:
    """The tensors of a head as a source of logits: flat, without rows of padding; and their names."""

    def flat(hidden: Any) -> list[Tensor]:
        return [part.reshape(-1, part.shape[-1]) for part in (hidden if are_depths(hidden) else [hidden])]

    def rows(part: Tensor) -> Tensor:  # those of padding never get probability
        return part if vocab is None or len(part) == vocab.rows else part[: vocab.rows]

    hidden, bias = flat(tensors["input"]), tensors["linear_bias"]
    parts, source = ["hidden"] * len(hidden) + ["weight"], [*hidden, rows(tensors["linear_weight"])]
    if bias is not None:
        parts.append("bias")
        source.append(rows(bias))
    if ADAPTER[0] in tensors:
        hidden = flat(tensors[ADAPTER[0]])
        parts += ["adapter_hidden"] * len(hidden) + ["adapter_weight"]
        source += [*hidden, rows(tensors[ADAPTER[1]])]
    return tuple(parts), source


def _logits(arguments: Arguments) -> tuple[Logits, Tensor | None, Logits]:
    """How logits follow from products, the temperatures (...) if these are not a factor of the scale, and how the
    teacher's logits follow from its products."""
    keywords, temperature = arguments.keywords, arguments.tensors.get("temperature")
    scale, softcap, number = (keywords[name] for name in ("logit_scale", "softcap", "temperature"))
    teacher = arguments.teacher or Teacher  # whose fields have defaults
    if softcap is None and teacher.softcap is None:
        return Logits(float(scale) / float(number)), temperature, Logits(float(teacher.logit_scale) / float(number))
    if temperature is None and number != 1.0:
        shape, device = arguments.tensors["target"].shape, arguments.input.device
        temperature = torch.full(shape, float(number), dtype=torch.float64, device=device)
    caps = [None if cap is None else float(cap) for cap in (softcap, teacher.softcap)]
    return Logits(float(scale), caps[0]), temperature, Logits(float(teacher.logit_scale), caps[1])
