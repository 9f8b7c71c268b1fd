"""The teacher of a call: its checks, and what the engine is given of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from chunked_ce.arguments import described
from chunked_ce.checks import compute_dtype_of
from chunked_ce.engine.released_parameters import is_released, where_it_is_whole
from chunked_ce.engine.specification import TeacherSpecification
from chunked_ce.objectives import Objective, Teacher
from chunked_ce.parallel.agreement import checksums
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.statistics import STATISTICS, Logits
from chunked_ce.tracing import check_values, has_values

__all__ = ["check_teacher", "facts_of_teacher", "of_this_rank", "product_dtype"]

_PER_TOKEN = ("hidden", "logits", "probabilities")


def check_teacher(
    teacher: Teacher | None,
    objective: Objective | None,
    shape: torch.Size,  # of the tokens
    device: torch.device,
    entries: int,  # of the vocabulary, on this rank
    vocab: VocabShard | None,
) -> None:
    """Check that a teacher is given if the objective needs one, and that it fits the student, by name."""
    names = () if objective is None else objective.statistics
    needs = any(STATISTICS[name].of_teacher for name in names)
    if teacher is None:
        if needs:
            raise TypeError(f"teacher must be a Teacher for {type(objective).__name__}, was None")
        return
    if not isinstance(teacher, Teacher):
        raise TypeError(f"teacher must be a chunked_ce.Teacher or None, was {described(teacher)}")
    if not needs:
        raise TypeError(f"teacher is given, but {type(objective).__name__} has none: use Divergence")
    tensors = teacher.tensors
    for name, tensor in tensors.items():
        _check_local(name, tensor, device)
    for name in _PER_TOKEN:
        if name in tensors and tuple(tensors[name].shape[:-1]) != tuple(shape):
            allowed = f"(*{tuple(shape)}, {'D' if name == 'hidden' else 'V'}), the tokens of target"
            raise ValueError(f"teacher.{name} must have shape {allowed}, had {tuple(tensors[name].shape)}")
    words = tensors.get("words")
    total = entries if vocab is None else vocab.total
    if words is not None and tuple(words.shape) != (total,):
        raise ValueError(
            f"teacher.words must have shape ({total},), the student's vocabulary, had {tuple(words.shape)}"
        )
    size = _vocabulary(tensors)
    if words is not None:
        allowed = f"teacher.words must be in [0, {size}), the teacher's vocabulary"
        check_values(words, lambda values: (values >= 0) & (values < size), allowed)
        return
    own = _is_own(teacher, vocab)  # no other rank has this rank's columns of its tokens
    sizes = [total] if vocab is None or own else [total, vocab.rows, vocab.padded_rows]
    if not any(size == each for each in sizes):
        name, dim = ("weight", "first") if "weight" in tensors else (_existing(tensors), "last")
        allowed = " or ".join(dict.fromkeys(str(each) for each in sizes if each is not None))
        raise ValueError(
            f"teacher.{name} must have the student's vocabulary, {allowed}, in its {dim} dimension, had shape "
            f"{tuple(tensors[name].shape)}: teacher.words says which entries a smaller vocabulary stands for"
        )


def _check_local(name: str, tensor: Tensor, device: torch.device) -> None:
    if is_dtensor(tensor):
        placements = tuple(tensor.placements)  # type: ignore[attr-defined]
        raise ValueError(
            f"teacher.{name} must be a plain tensor, was a DTensor with placements {placements}: give "
            "full_tensor(), or with vocab= this rank's entries, to_local()"
        )
    if tensor.device != device:
        raise ValueError(f"teacher.{name} must be on the student's device {device}, was on {tensor.device}")


def _vocabulary(tensors: dict[str, Tensor]) -> int:
    """The entries of the teacher's vocabulary, once its head is found to be right."""
    if "hidden" not in tensors:
        return tensors[_existing(tensors)].shape[-1]
    hidden, weight, bias = tensors["hidden"], tensors["weight"], tensors.get("bias")
    if is_released(weight) or (hasattr(weight, "ds_id") and weight.numel() == 0):
        raise ValueError(f"teacher.weight must be (V, D) with values, had none. {where_it_is_whole(weight)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"teacher.weight must be (V, D) with D = {hidden.shape[-1]}, the last dimension of teacher.hidden, had "
            f"shape {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
        raise ValueError(f"teacher.bias must have shape {tuple(weight.shape[:1])}, had {tuple(bias.shape)}")
    return weight.shape[0]


def _existing(tensors: dict[str, Tensor]) -> str:
    return "logits" if "logits" in tensors else "probabilities"


def _is_own(teacher: Teacher, vocab: VocabShard | None) -> bool:
    """Whether a teacher has logits or probabilities of tokens that only this rank has."""
    return vocab is not None and vocab.tokens == "own" and teacher.hidden is None


def facts_of_teacher(teacher: Teacher | None, vocab: VocabShard) -> dict[str, Any]:
    """The facts that must be equal on every rank of a vocabulary group, by name: a teacher's entries may differ."""
    if teacher is None:
        return {"teacher": None}
    dtypes = tuple(x.dtype for x in teacher.tensors.values())
    facts: dict[str, Any] = {"teacher": tuple(teacher.tensors), "teacher's dtypes": dtypes}
    facts |= {f"teacher.{name}": getattr(teacher, name) for name in ("softcap", "logit_scale")}
    if teacher.hidden is not None:
        facts["teacher.hidden's last dimension"] = teacher.hidden.shape[-1]
    same = ("words",) if vocab.tokens == "own" else ("hidden", "words")
    return facts | checksums({f"teacher.{name}": teacher.tensors[name] for name in same if name in teacher.tensors})


def product_dtype(teacher: Teacher | None, vocab: VocabShard | None) -> torch.dtype | None:
    """The dtype of the teacher's logits that a chunk holds beside the student's, None if they exist on this rank."""
    if teacher is None:
        return None
    if teacher.hidden is not None:
        return compute_dtype_of(teacher.hidden)
    return teacher.tensors[_existing(teacher.tensors)].dtype if _is_own(teacher, vocab) else None


def of_this_rank(
    teacher: Teacher, vocab: VocabShard | None, logits: Logits, share: float
) -> tuple[TeacherSpecification, list[Tensor]]:
    """What the engine is given: detached tensors, flat in their tokens, with the entries of this rank, but all of them
    where other ranks need theirs."""
    tensors = {name: tensor.detach() for name, tensor in teacher.tensors.items()}
    for name in _PER_TOKEN:
        if name in tensors:
            tensors |= _flat(name, tensors[name])
    if vocab is not None and not _is_own(teacher, vocab):
        mine = slice(vocab.start, vocab.stop)
        if "words" in tensors:
            tensors["words"] = tensors["words"][mine]
        else:
            size = tensors["weight" if "weight" in tensors else _existing(tensors)].shape[
                0 if "weight" in tensors else 1
            ]
            mine = mine if size == vocab.total else slice(0, vocab.rows)
            for name in ("weight", "bias"):
                if name in tensors:
                    tensors[name] = tensors[name][mine]
            for name in ("logits", "probabilities"):
                if name in tensors:
                    tensors[name] = tensors[name][:, mine]
    if "words" in tensors:
        tensors["words"] = tensors["words"].long()
    dtype = product_dtype(teacher, vocab) or teacher.tensors[_existing(teacher.tensors)].dtype
    return TeacherSpecification(tuple(tensors), logits, dtype, share), list(tensors.values())


def _flat(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Tensors (..., B) as (N, B), without a copy of logits: rows (M, B) of the same memory, and the row (N,) of each
    token in ``"place"``, where the tokens have no single stride, as those of ``logits[:, :-1]``."""
    *sizes, _ = tensor.shape
    if name == "hidden" or not has_values(*tensor.shape):
        return {name: tensor.reshape(-1, tensor.shape[-1])}
    try:
        return {name: tensor.view(-1, tensor.shape[-1])}
    except RuntimeError:
        pass
    *strides, last = tensor.stride()
    step = math.gcd(*strides) or 1
    place = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(sizes, strides, strict=True):
        place = place.unsqueeze(-1) + torch.arange(size, device=tensor.device) * (stride // step)
    num_rows = 1 + sum((size - 1) * (stride // step) for size, stride in zip(sizes, strides, strict=True))
    return {name: tensor.as_strided((num_rows, tensor.shape[-1]), (step, last)), "place": place.flatten()}
