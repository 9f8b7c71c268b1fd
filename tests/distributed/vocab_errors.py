"""What the ranks of `test_vocab_errors.py` run: calls that must fail, on every rank and without a hang."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from chunked_ce import ChunkOptions, VocabShard, cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.parallel import agreement

RANKS = 3
SHARDS = ((0, 3), (3, 4), (4, 9))
TOKENS, HIDDEN = 6, 4
ODD_ONE = 1  # the rank that does something else than the others


class Failure(NamedTuple):
    type: str
    message: str


def failure(function: Callable) -> Failure | None:
    try:
        function()
    except Exception as error:
        return Failure(type(error).__name__, str(error))
    return None


def arguments(rank: int) -> dict:
    """Of a call that works."""
    start, stop = SHARDS[rank]
    generator = torch.Generator().manual_seed(0)
    return {
        "function": linear_cross_entropy,
        "input": torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True),
        "linear_weight": torch.randn(9, HIDDEN, generator=generator)[start:stop].requires_grad_(),
        "target": torch.tensor([0, 8, 3, -100, 5, 1]),
        "linear_bias": torch.zeros(stop - start),
        "weight": torch.ones(9),
        "token_weight": torch.ones(TOKENS),
        "vocab": {},
        "context": contextlib.nullcontext(),
    }


def call(rank: int, function, input, linear_weight, target, vocab: dict, context, **keywords) -> torch.Tensor:
    start, stop = SHARDS[rank]
    vocab = VocabShard(**{"group": None, "start": start, "stop": stop, "total": 9} | vocab)
    if function is linear_logprobs:
        keywords = {name: keywords[name] for name in ("linear_bias",)}
    if function is cross_entropy:
        input = (input @ linear_weight.t()).detach().requires_grad_()
        with context:
            del keywords["linear_bias"]
            return cross_entropy(input, target, vocab=vocab, **keywords)
    with context:
        return function(input, linear_weight, target, vocab=vocab, **keywords)


def changed(values: torch.Tensor) -> torch.Tensor:
    """In the last bit of one value."""
    found = values.detach().clone()
    found.view(-1)[-1] = torch.nextafter(found.view(-1)[-1], torch.tensor(9.0))
    return found.requires_grad_(values.requires_grad)


def without_memory(message: str):
    """A call of a rank that cannot form what it compares with the others."""
    return mock.patch.object(agreement, "checksum", side_effect=torch.OutOfMemoryError(message))


# What the odd one does otherwise, by the argument that the error must name.
DISAGREEMENTS = {
    "target: rank 0 has (6,), rank 1 has (5,), rank 2 has (6,)": lambda a: {
        "input": a["input"][:5],
        "target": a["target"][:5],
        "token_weight": a["token_weight"][:5],
    },
    "target's values": lambda a: {"target": a["target"].flip(0)},
    "reduction: rank 0 has 'mean', rank 1 has 'sum', rank 2 has 'mean'": lambda a: {"reduction": "sum"},
    "label_smoothing: rank 0 has 0.0, rank 1 has 0.1": lambda a: {"label_smoothing": 0.1},
    "z_loss": lambda a: {"z_loss": 0.1},
    "softcap": lambda a: {"softcap": 3.0},
    "logit_scale": lambda a: {"logit_scale": 2.0},
    "ignore_index": lambda a: {"ignore_index": 5},
    "num_tokens": lambda a: {"num_tokens": 5},
    "return_stats": lambda a: {"return_stats": True},
    "options": lambda a: {"options": ChunkOptions(chunk_size=2)},
    "function: rank 0 has 'linear_cross_entropy', rank 1 has 'cross_entropy'": lambda a: {"function": cross_entropy},
    "function: rank 0 has 'linear_cross_entropy', rank 1 has 'linear_logprobs'": lambda a: {
        "function": linear_logprobs
    },
    "token_weight": lambda a: {"token_weight": None},
    "linear_bias": lambda a: {"linear_bias": None},
    "weight: rank 0 has True, rank 1 has False": lambda a: {"weight": None},
    "weight, of the whole vocabulary or not": lambda a: {"weight": a["weight"][:1]},
    "input dtype": lambda a: {"input": a["input"].detach().double().requires_grad_()},
    "linear_weight dtype": lambda a: {"linear_weight": a["linear_weight"].detach().bfloat16().requires_grad_()},
    "input.requires_grad": lambda a: {"input": a["input"].detach()},
    "linear_weight.requires_grad": lambda a: {"linear_weight": a["linear_weight"].detach()},
    "grad mode": lambda a: {"context": torch.no_grad()},
    "autocast": lambda a: {"context": torch.autocast("cpu", torch.bfloat16)},
    "input's last dimension": lambda a: {
        "input": a["input"][:, :3].detach().requires_grad_(),
        "linear_weight": a["linear_weight"][:, :3].detach().requires_grad_(),
    },
    "input_grad": lambda a: {"vocab": {"input_grad": "partial"}},
    "reduce_dtype": lambda a: {"vocab": {"reduce_dtype": torch.bfloat16}},
    "check": lambda a: {"vocab": {"check": "first"}},
    "input's values (a checksum): dropout with a seed of each rank's own": lambda a: {"input": changed(a["input"])},
    "input's values (a checksum)": lambda a: {"input": a["input"].detach().flip(0).requires_grad_()},
    "token_weight's values (a checksum)": lambda a: {"token_weight": changed(a["token_weight"])},
    "weight's values (a checksum)": lambda a: {"weight": changed(a["weight"])},
    "total: rank 0 has 9, rank 1 has 10": lambda a: {"vocab": {"total": 10}, "weight": torch.ones(10)},
}
BOUNDS = {
    "shards of the vocabulary overlap at row 2: rank 0 has [0, 3), rank 1 has [2, 4), rank 2 has [4, 9)": (2, 4),
    "shards of the vocabulary leave a gap at row 3: rank 0 has [0, 3), rank 1 has [4, 4), rank 2 has [4, 9)": (4, 4),
}
# What the odd one gets wrong by itself, by its own error.
WRONG_ALONE = {
    "linear_weight must be (V, D) with D = 4": lambda a: {"linear_weight": a["linear_weight"][:, :3]},
    "linear_weight must hold the 1 words [3, 4) of vocab, had 9": lambda a: {"linear_weight": torch.randn(9, HIDDEN)},
    "target must have the shape": lambda a: {"target": a["target"][:5]},
    "target must be int32 or int64": lambda a: {"target": a["target"].short()},
    "weight must have shape (1,) or (9,), had (4,)": lambda a: {"weight": torch.ones(4)},
    "label_smoothing must be in [0, 1]": lambda a: {"label_smoothing": 2.0},
    "options.gradients='forward'": lambda a: {"reduction": "none", "options": ChunkOptions(gradients="forward")},
    "options must be a ChunkOptions": lambda a: {"options": {"chunk_size": 3}},
    "no memory for a checksum": lambda a: {"context": without_memory("no memory for a checksum")},
}
# What is wrong on every rank.
OUT_OF_RANGE = {
    (function.__name__, way, target): {
        "function": function,
        "target": torch.tensor([0, 8, target, -100, 5, 1]),
        **({} if function is linear_logprobs else {"options": ChunkOptions(gradients=way)}),
    }
    for function in (linear_cross_entropy, linear_logprobs, cross_entropy)
    for way in ("forward", "backward")
    for target in (9, -1, 10**6)
}
SHARD_ARGUMENTS = {
    "group must be None or a ProcessGroup": lambda: VocabShard("group", 0, 1, 1),
    "group must be None or a ProcessGroup that this rank is in, was -100": lambda: VocabShard(-100, 0, 1, 1),
    "start must be an integer, was 0.0": lambda: VocabShard(None, 0.0, 1, 1),
    "stop must be an integer, was '1'": lambda: VocabShard(None, 0, "1", 1),
    "total must be an integer, was True": lambda: VocabShard(None, 0, 1, True),
    "0 <= start <= stop <= total and total >= 1, were -1, 1, 2": lambda: VocabShard(None, -1, 1, 2),
    "0 <= start <= stop <= total and total >= 1, were 2, 1, 2": lambda: VocabShard(None, 2, 1, 2),
    "0 <= start <= stop <= total and total >= 1, were 0, 3, 2": lambda: VocabShard(None, 0, 3, 2),
    "0 <= start <= stop <= total and total >= 1, were 0, 0, 0": lambda: VocabShard(None, 0, 0, 0),
    "input_grad must be one of ('complete', 'partial', 'sequence'), was 'sum'": lambda: VocabShard(
        None, 0, 1, 1, input_grad="sum"
    ),
    "reduce_dtype must be None or a floating-point dtype, was torch.int32": lambda: VocabShard(
        None, 0, 1, 1, reduce_dtype=torch.int32
    ),
    "reduce_dtype must be None or a floating-point dtype, was 'fp32'": lambda: VocabShard(
        None, 0, 1, 1, reduce_dtype="fp32"
    ),
    "check must be 'auto', 'always' or 'first', was 'never'": lambda: VocabShard(None, 0, 1, 1, check="never"),
    "padded_rows must be None or >= stop - start = 2, was 1": lambda: VocabShard(None, 0, 2, 2, padded_rows=1),
    "total must be an integer >= 1, was 0": lambda: VocabShard.split(0),
    "total must be an integer >= 1, was 2.0": lambda: VocabShard.split(2.0),
    "padded must be >= total = 9 and a multiple of 3 ranks, was 10": lambda: VocabShard.split(9, padded=10),
    "padded must be >= total = 9 and a multiple of 3 ranks, was 6": lambda: VocabShard.split(9, padded=6),
    "input_grad must be one of": lambda: VocabShard.split(9, input_grad=None),
    "rows must be an integer >= 0 on every rank: rank 0 has 1, rank 1 has -1, rank 2 has 1": lambda: (
        VocabShard.from_local(-1 if dist.get_rank() == ODD_ONE else 1)
    ),
    "rows must be an integer >= 0 on every rank: rank 0 has 1, rank 1 has 'a'": lambda: VocabShard.from_local(
        "a" if dist.get_rank() == ODD_ONE else 1
    ),
    "layer must be DeepSpeed's VocabParallelLinear, was Linear": lambda: VocabShard.from_deepspeed(
        torch.nn.Linear(1, 1)
    ),
}


def run_all(rank: int, world_size: int) -> dict:
    odd = rank == ODD_ONE
    found = {}
    for name, change in (DISAGREEMENTS | WRONG_ALONE).items():
        mine = arguments(rank)
        mine |= change(mine) if odd else {}
        if name == "ignore_index":  # the same tokens, or the targets would differ first
            mine["target"] = torch.tensor([0, 8, 3, 2, 5, 1])
        found[name] = failure(lambda mine=mine: call(rank, **mine))
    for name, (start, stop) in BOUNDS.items():
        mine = arguments(rank)
        if odd:
            shape = {"linear_weight": torch.randn(stop - start, HIDDEN), "linear_bias": torch.zeros(stop - start)}
            mine |= shape | {"vocab": {"start": start, "stop": stop}}
            mine["linear_weight"].requires_grad_()
        found[name] = failure(lambda mine=mine: call(rank, **mine))
    for name, change in OUT_OF_RANGE.items():
        found[name] = failure(lambda change=change: call(rank, **arguments(rank) | change))
    for name, make in SHARD_ARGUMENTS.items():
        found[name] = failure(make)
    # The ranks are still in step: a call that is right works.
    found["afterwards"] = failure(lambda: call(rank, **arguments(rank)).backward())
    return found
