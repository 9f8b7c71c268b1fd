"""`VocabShard`: this rank's rows of a head whose vocabulary is sharded over a group of ranks."""

from __future__ import annotations

import dataclasses
import pickle
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from chunked_ce.arguments import FLOATING, described, integer, is_integer, is_one_of
from chunked_ce.parallel.collectives import Collectives, all_gather_single, broken_as, exchange, object_device
from chunked_ce.parallel.fsdp import fsdp_refusal, is_fsdp_shard
from chunked_ce.parallel.groups import checked_group, group_of_ranks
from chunked_ce.parallel.meeting import Doing, check_facts, digest, meet
from chunked_ce.parallel.shard import Shard

__all__ = ["WEIGHT_VALUES", "WHOLE_WEIGHT", "VocabShard"]

WHOLE_WEIGHT = "weight, of the whole vocabulary or not"
WEIGHT_VALUES = "weight's values (a checksum)"
_INPUT_GRADS = ("complete", "partial", "sequence")
_TOKENS = ("same", "own")


@dataclasses.dataclass(frozen=True, eq=False)
class VocabShard:
    """Rows [start, stop) of a head with ``total`` rows; the other ranks of ``group`` hold the others.

    ``input`` and ``target`` are the same on every rank of the group, and so are losses and statistics; each rank gets
    the gradient of its own rows. Shards may differ in size and may be empty.

    With ``tokens="own"`` each rank has hidden states, targets and weights of its own, as many as it likes or none, and
    its loss and statistics are those of its own tokens, as if it held the whole head. All ranks call the loss, and its
    backward, as often as each other. The gradient of a rank's rows is the sum over the losses of all ranks, each
    with the upstream gradient that it has there, divided by the number of ranks: what DDP, FSDP and ZeRO make of every
    other parameter.

    Args:
        group: the ranks that share the vocabulary; None for all ranks.
        start, stop: this rank's rows, 0 <= start <= stop <= total.
        total: rows on all ranks, each row on one of them.
        input_grad: ``"complete"``: the input's gradient is summed over the group. ``"partial"``: it is left as this
            rank's share, for frameworks whose own layer sums it. ``"sequence"``: ``input`` holds this rank's share of
            the tokens, in the order of the ranks and as many on each; it is gathered chunk by chunk and its gradient
            reduce-scattered. ``target`` and ``token_weight`` then hold the tokens of all ranks, in that order.
        tokens: ``"same"``: every rank has the same tokens; ``"own"``: its own (``input_grad`` is then ``"complete"``,
            and there are no logits that exist).
        reduce_dtype: the dtype in which ranks sum the input's gradient; None for ``accumulate_dtype`` (fp32).
        check: whether ranks compare their calls, so that a disagreement is an error on every rank and not a hang:
            ``"always"``, ``"first"`` (only at the first call, so that later ones need no host synchronisation), or
            ``"auto"``: ``"always"`` if the tensors are on the CPU, else ``"first"``.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """

    group: dist.ProcessGroup
    start: int
    stop: int
    total: int
    input_grad: Literal["complete", "partial", "sequence"] = "complete"
    reduce_dtype: torch.dtype | None = None
    check: Literal["auto", "always", "first"] = "auto"
    padded_rows: int | None = None
    """Rows of this rank's head with the padding at its end, which never gets probability; None without padding."""
    tokens: Literal["same", "own"] = "same"
    ranks: tuple[int, ...] = dataclasses.field(init=False, repr=False)
    """The global ranks of the group."""

    row_gradient_factor: ClassVar[float] = 1.0  # for the rows of DTensors, where FSDP2 has a divide factor of its own

    if TYPE_CHECKING:  # the group may be given as None, and is none no more once the shard is made

        def __init__(
            self,
            group: dist.ProcessGroup | None,
            start: int,
            stop: int,
            total: int,
            input_grad: Literal["complete", "partial", "sequence"] = "complete",
            reduce_dtype: torch.dtype | None = None,
            check: Literal["auto", "always", "first"] = "auto",
            padded_rows: int | None = None,
            tokens: Literal["same", "own"] = "same",
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", checked_group(self.group))
        object.__setattr__(self, "ranks", tuple(dist.get_process_group_ranks(self.group)))
        for name in ("start", "stop", "total"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        if not 0 <= self.start <= self.stop <= self.total or self.total < 1:
            raise ValueError(
                "start, stop and total must be 0 <= start <= stop <= total and total >= 1, "
                f"were {self.start}, {self.stop}, {self.total}"
            )
        if not is_one_of(self.input_grad, _INPUT_GRADS):
            raise ValueError(f"input_grad must be one of {_INPUT_GRADS}, was {described(self.input_grad)}")
        if not is_one_of(self.tokens, _TOKENS):
            raise ValueError(f"tokens must be one of {_TOKENS}, was {described(self.tokens)}")
        if self.tokens == "own" and self.input_grad != "complete":
            raise ValueError(
                "input_grad must be 'complete' with tokens='own', since no other rank has this rank's input, "
                f"was {described(self.input_grad)}"
            )
        dtype = self.reduce_dtype
        if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATING.dtypes):
            raise ValueError(f"reduce_dtype must be None or a floating-point dtype, was {described(dtype)}")
        if not is_one_of(self.check, ("auto", "always", "first")):
            raise ValueError(f"check must be 'auto', 'always' or 'first', was {described(self.check)}")
        if self.padded_rows is not None:
            padded = integer("padded_rows", self.padded_rows, "None or an integer")
            object.__setattr__(self, "padded_rows", padded)
            if padded < self.rows:
                raise ValueError(f"padded_rows must be None or >= stop - start = {self.rows}, was {padded}")

    def __copy__(self) -> VocabShard:
        return self  # a shard does not change

    def __deepcopy__(self, _memo: dict[int, Any]) -> VocabShard:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """The group is pickled as its ranks: the process that unpickles it looks up its own group of them."""
        names = [field.name for field in dataclasses.fields(self) if field.init and field.name != "group"]
        values = {name: getattr(self, name) for name in names}
        return _unpickled, (type(self), list(self.ranks), self.group.group_name, values)

    @classmethod
    def split(
        cls, total: int, group: dist.ProcessGroup | None = None, *, padded: int | None = None, **keywords: Any
    ) -> Self:
        """An even split, as of `torch.chunk` and DTensor: ``ceil(total / R)`` rows per rank, fewer on the last ones.

        A head whose shards all have that size, or ``padded / R`` rows of a vocabulary padded to ``padded``, is accepted
        too: rows from ``total`` on are padding.
        """
        group = checked_group(group)
        if not is_integer(total) or total < 1:
            raise ValueError(f"total must be an integer >= 1, was {described(total)}")
        total = integer("total", total)
        padded = None if padded is None else integer("padded", padded, "None or an integer")
        ranks = dist.get_world_size(group)
        if padded is not None and (padded < total or padded % ranks):
            raise ValueError(f"padded must be >= total = {total} and a multiple of {ranks} ranks, was {padded}")
        rows = -(-(padded or total) // ranks)
        start = min(dist.get_rank(group) * rows, total)
        return cls(group, start, min(start + rows, total), total, padded_rows=rows, **keywords)

    @classmethod
    def from_local(cls, rows: int, group: dist.ProcessGroup | None = None, **keywords: Any) -> Self:
        """From the number of rows that this rank holds, which the ranks exchange."""
        group = checked_group(group)
        sizes = exchange(rows, group, "chunked_ce: the exchange of the shards' sizes")
        if not all(type(size) is int and size >= 0 for size in sizes):
            said = ", ".join(f"rank {rank} has {size!r}" for rank, size in enumerate(sizes))
            raise ValueError(f"rows must be an integer >= 0 on every rank: {said}")
        rank = dist.get_rank(group)
        start = sum(sizes[:rank])
        return cls(group, start, start + rows, sum(sizes), **keywords)

    @classmethod
    def from_dtensor(cls, weight: Tensor, **keywords: Any) -> Self:
        """From a DTensor (V, D) sharded on dim 0 along one dimension of its mesh, by tensor parallelism.

        With ``tokens="own"`` it may be a parameter that ``fully_shard`` has sharded, and is used while it is sharded.
        """
        dtensor: Any = weight
        if not hasattr(dtensor, "placements"):
            raise TypeError(f"weight must be a DTensor, was {type(weight).__name__}")
        if keywords.get("tokens") != "own" and is_fsdp_shard(weight):
            raise ValueError(fsdp_refusal("weight", weight))
        return cls.from_placements(dtensor.device_mesh, tuple(dtensor.placements), dtensor.shape, **keywords)

    @classmethod
    def from_placements(
        cls,
        mesh: Any,
        placements: tuple[Any, ...],
        shape: tuple[int, ...],
        *,
        name: str = "linear_weight",
        dim: int = 0,
        **keywords: Any,
    ) -> Self:
        """From the mesh and placements of a DTensor whose dimension ``dim`` is a vocabulary of ``shape[0]``."""
        from torch.distributed.tensor import Shard as ShardPlacement
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sharded = [at for at, placement in enumerate(placements) if not placement.is_replicate()]
        if len(sharded) != 1 or type(placements[sharded[0]]) is not ShardPlacement or placements[sharded[0]].dim != dim:
            raise ValueError(
                f"{name} must be sharded on dim {dim} along one dimension of its mesh and replicated along the "
                f"others, had placements {placements}"
            )
        rows = tuple(placement if placement.is_replicate() else ShardPlacement(0) for placement in placements)
        local, offset = compute_local_shape_and_global_offset(shape[:1], mesh, rows)
        start = offset[0] if local[0] else shape[0]
        return cls(mesh.get_group(sharded[0]), start, start + local[0], shape[0], **keywords)

    @classmethod
    def from_deepspeed(cls, layer: nn.Module, **keywords: Any) -> Self:
        """From DeepSpeed's ``VocabParallelLinear``, whose weight is this rank's shard."""
        names = ("mp_group", "vocab_start_index", "vocab_end_index", "vocab_size")
        try:
            group, *bounds = (getattr(layer, name) for name in names)
        except AttributeError as error:
            raise TypeError(f"layer must be DeepSpeed's VocabParallelLinear, was {type(layer).__name__}") from error
        if group is None:  # here None would mean all ranks
            raise ValueError("layer must be sharded over a group, but its mp_group is None: leave vocab out")
        return cls(group, *bounds, **keywords)

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return dist.get_world_size(self.group)

    def plain(self) -> Shard:
        """The plain values that operators take."""
        values = self.start, self.total, self.input_grad, self.reduce_dtype, self.tokens
        return Shard(self.group.group_name, *values)

    def compares(self, *, on_cpu: bool = True) -> bool:
        """Whether this rank's call is to be compared with the others'."""
        always = self.check == "always" or (self.check == "auto" and on_cpu)
        return always or getattr(self, "_bounds", None) is None

    def agree(self, call: dict[str, Any], error: Exception | None = None, *, on_cpu: bool = True) -> None:
        """Compare this rank's call with the others', if due; an ``error`` of this rank is raised on every rank.

        ``call`` holds, by name, the values that must be equal on every rank.
        """
        if torch.compiler.is_compiling():
            return
        if not self.compares(on_cpu=on_cpu):
            if error is not None:
                raise error
            return
        mine = {"error": None if error is None else str(error), "call": {"total": self.total, **call}}
        ranks, doing = Collectives(self.group.group_name), Doing("the comparison of calls")
        numbers = digest(pickle.dumps(mine)), self.start, self.stop
        found = meet(ranks, doing, *numbers, device=object_device(self.group))
        digests, bounds = [one for one, *_ in found], [(start, stop) for _, start, stop, *_ in found]
        everyone = None
        if len(set(digests)) > 1:
            everyone = exchange(mine, self.group, f"chunked_ce: {doing.what}")
        if error is not None:
            raise error
        if everyone is not None:
            self._check_calls(everyone, bounds)
        _check_cover(bounds, self.total)
        object.__setattr__(self, "_bounds", bounds)

    def _check_calls(self, everyone: list[dict[str, Any]], bounds: list[tuple[int, int]]) -> None:
        """Raise if the calls of all ranks are not alike, or one of them has an error."""
        for rank, other in enumerate(everyone):
            if other["error"] is not None:
                raise ValueError(f"vocab: rank {rank} of the group could not take part: {other['error']}")
        calls = [other["call"] for other in everyone]
        if (0, self.total) in bounds:  # then one rank's shard of the class weights is the whole
            of_weight = (WHOLE_WEIGHT, WEIGHT_VALUES)
            calls = [{name: fact for name, fact in call.items() if not name.startswith(of_weight)} for call in calls]
        check_facts(calls)

    def whole_vocabulary(self, values: Tensor) -> Tensor:
        """``values`` (V,) as they are, or gathered from all ranks if they are those of this rank's rows (rows,)."""
        if len(values) == self.total and (self.size == 1 or self.rows not in (0, self.total)):
            return values
        bounds = getattr(self, "_bounds", None)
        if bounds is None:
            bounds = exchange((self.start, self.stop), self.group, "chunked_ce: the exchange of the shards' bounds")
            object.__setattr__(self, "_bounds", bounds)
        if len(values) == self.total and (0, self.total) not in bounds:
            return values
        largest = max(stop - start for start, stop in bounds)
        mine = values.new_zeros(largest)
        mine[: self.rows] = values[: self.rows]
        gathered = values.new_empty(self.size, largest)
        with broken_as("chunked_ce: the all-gather of weight"):
            all_gather_single(gathered.view(-1), mine, group=self.group)  # which a compiler can trace
        whole = values.new_empty(self.total)
        for (start, stop), part in zip(bounds, gathered, strict=True):
            whole[start:stop] = part[: stop - start]
        return whole


def _unpickled(cls: type[VocabShard], ranks: list[int], group_name: str, values: dict[str, Any]) -> VocabShard:
    return cls(group_of_ranks(ranks, group_name), **values)


def _check_cover(bounds: list[tuple[int, int]], total: int) -> None:
    said = ", ".join(f"rank {rank} has [{start}, {stop})" for rank, (start, stop) in enumerate(bounds))
    reached = 0
    for start, stop in sorted(bound for bound in bounds if bound[0] < bound[1]):
        if start != reached:
            what = "overlap" if start < reached else "leave a gap"
            raise ValueError(f"shards of the vocabulary {what} at row {min(start, reached)}: {said}")
        reached = stop
    if reached != total:
        raise ValueError(f"shards of the vocabulary leave a gap at row {reached} of {total}: {said}")
