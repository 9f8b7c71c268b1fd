"""Ranks that hold tokens of their own, and what each of them gets from one process that holds the whole head.

A case is a function of a rank's tensors, of the head and of a shard, or None: it returns differentiable values of the
rank's own tokens. `alone` calls it with the whole head, for one rank after another; `sharded` on every rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce import VocabShard

RANKS, VOCAB, WIDTH, OTHER_WIDTH, RANK_R = 3, 19, 5, 3, 2
BOUNDS = ((0, 0), (0, 12), (12, 19))
SIZES = {"uneven": (7, 0, 12), "even": (4, 4, 4), "nowhere": (0, 0, 0), "one": (0, 1, 0)}
UPSTREAM = (1.0, -0.5, 2.0)  # of the ranks, where they differ


class Tensors(NamedTuple):
    """What a call takes: of a rank's own tokens, and of the rows of the head."""

    hidden: Tensor  # (N_r, D)
    adapter_hidden: Tensor  # (N_r, r)
    weight: Tensor  # (V, D), or this rank's rows
    bias: Tensor
    adapter_weight: Tensor
    target: Tensor  # (N_r,)
    more: dict[str, Tensor]  # constant, (N_r, ...), by name

    def leaves(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in zip(self._fields[:5], self[:5], strict=True) if leaf.requires_grad}


Function = Callable[[Tensors, VocabShard | None], list[Tensor]]


class Case(NamedTuple):
    name: str
    function: Function
    sizes: str = "uneven"
    dtype: torch.dtype = torch.float64
    differ: bool = False  # whether upstream gradients do
    frozen: tuple[str, ...] = ()
    ignored: tuple[float, ...] = (0.3, 0.3, 0.3)  # the share of ignored tokens, by rank


def tensors_of(case: Case, rank: int, *, whole: bool) -> Tensors:
    def normal(generator, *shape):
        return (0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(case.dtype)

    g, n = torch.Generator().manual_seed(17 + rank), SIZES[case.sizes][rank]
    target = torch.randint(VOCAB, (n,), generator=g)
    target = target.where(torch.rand(n, generator=g) >= case.ignored[rank], -100)
    of_tokens = normal(g, n, WIDTH), normal(g, n, RANK_R)
    ids = torch.rand(n, VOCAB, generator=g).argsort(-1)[:, :4]
    more = {
        "token_weight": torch.rand(n, generator=g) + 0.1,
        "temperature": torch.rand(n, generator=g) + 0.5,
        "advantage": torch.randn(n, generator=g),
        "old_logprob": -torch.rand(n, generator=g) - 2,
        "ref_logprob": -torch.rand(n, generator=g) - 2,
        "ids": ids.where(torch.rand(ids.shape, generator=g) > 0.2, -100).where(target.unsqueeze(1) != -100, -100),
        "full_ids": ids,
        "teacher_logprobs": torch.rand(n, 4, generator=g).log_softmax(-1) - 0.1,
        "teacher_hidden": normal(g, n, OTHER_WIDTH),
        "teacher_logits": 2 * normal(g, n, VOCAB),
        "larger_logits": 2 * normal(g, n, 2 * VOCAB),
    }
    g, rows = torch.Generator().manual_seed(5), slice(None) if whole else slice(*BOUNDS[rank])
    head = normal(g, VOCAB, WIDTH), normal(g, VOCAB), normal(g, VOCAB, RANK_R)
    more["teacher_weight"], more["larger_weight"] = normal(g, VOCAB, OTHER_WIDTH), normal(g, 2 * VOCAB, OTHER_WIDTH)
    more["words"] = torch.randperm(2 * VOCAB, generator=g)[:VOCAB]
    parts = [*of_tokens, *(part[rows] for part in head)]
    names = Tensors._fields[:5]
    leaves = [part.clone().requires_grad_(name not in case.frozen) for name, part in zip(names, parts, strict=True)]
    return Tensors(*leaves, target, more)


def shard_of(rank: int, **keywords) -> VocabShard:
    return VocabShard(dist.group.WORLD, *BOUNDS[rank], VOCAB, tokens="own", **keywords)


def total_of(case: Case, rank: int, values: list[Tensor]) -> Tensor:
    """One number, whose upstream gradients differ between the ranks if the case's do, and between tokens always."""
    factor = UPSTREAM[rank] if case.differ else 1.5
    return sum((value * (torch.arange(value.numel()).view(value.shape) + factor)).sum() for value in values)


def results_of(case: Case, rank: int, vocab: VocabShard | None) -> dict[str, Tensor]:
    """The values, and the gradients of the leaves that the function uses, by name."""
    tensors = tensors_of(case, rank, whole=vocab is None)
    values = case.function(tensors, vocab)
    found = {f"value {at}": value.detach() for at, value in enumerate(values)}
    total, leaves = total_of(case, rank, values), tensors.leaves()
    if not total.requires_grad:
        return found
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        if gradient is not None:
            assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
            found[name] = gradient
    return found


def alone(case: Case) -> list[dict[str, Tensor]]:
    """What each rank should get: its own values, and of the gradients of the head its rows of the mean over ranks."""
    of_ranks = [results_of(case, rank, None) for rank in range(RANKS)]
    for name in ("weight", "bias", "adapter_weight"):
        if name in of_ranks[0]:
            mean = sum(found[name].double() for found in of_ranks) / RANKS
            for rank, found in enumerate(of_ranks):
                found[name] = mean[slice(*BOUNDS[rank])].to(found[name].dtype)
    return of_ranks
