"""What the ranks of `test_in_step.py` run: calls in which one rank fails alone, and the calls after them."""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from chunked_ce import (
    ChunkOptions,
    Teacher,
    VocabShard,
    cross_entropy,
    invocation,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
)
from chunked_ce.engine import dispatch, sources, sweep, token_shards
from chunked_ce.engine.gradient_products import ChunkProducts
from chunked_ce.rows import torch_rows as rows
from tests.cases import chunks, problem
from tests.distributed import out_of_step
from tests.distributed.vocab_errors import Failure, failure
from tests.objectives.teachers import teacher_tensors

RANKS, ODD_ONE = 3, 1
VOCAB, WIDTH, TOKENS, CHUNK = 11, 5, 24, 6
OWN, OWN_CHUNKS = (0, 12, 15, 24), 4  # the tokens of each rank, where each has its own, and the chunks that they make

# Where the odd rank runs out of memory, by what replaces the function.
PLACES = {
    "statistics": (rows, "shard_statistics"),
    "second": (rows, "second_statistics"),
    "gradients": (rows, "logit_gradients"),
    "head": (ChunkProducts, "add_head"),
    "hidden": (ChunkProducts, "hidden"),
    "start": (sweep, "zero_statistics"),
    "sums": (sweep, "ForwardTotals"),
    "backward": (sweep, "_destination"),
    "tokens": (sources, "CountedTokens"),
    # Where ranks have tokens of their own:
    "arguments": (invocation, "with_ignored"),  # between the comparison of calls and the engine
    "weights": (dispatch.TokenWeights, "coefficient"),
    "columns": (token_shards, "_as_bytes"),  # before the exchange of numbers
    "gathered": (token_shards, "_joined"),  # after the all-gather of tokens
}


BAD_TARGETS = [
    (function, input_grad) for function in ("forward", "backward", "logprobs") for input_grad in ("complete", "own")
]
BAD_TARGETS.append(("logits", "complete"))


class Scene(NamedTuple):
    function: str  # and way
    input_grad: str
    place: str
    time: int = 0  # how often it is gone through before
    ignored: str = "auto"

    def __str__(self):
        return "-".join(map(str, self))


def scenes() -> list[Scene]:
    found = [
        Scene("forward", input_grad, place, time)
        for input_grad in ("complete", "partial", "sequence")
        for place, time in [
            *itertools.product(("statistics", "gradients", "head"), (0, 2)),
            ("hidden", 0),
            ("hidden", 2),
            ("sums", 0),
            ("tokens", 0),
        ]
    ]
    for function, input_grad in itertools.product(("backward", "logprobs"), ("complete", "sequence")):
        found += [Scene(function, input_grad, "statistics"), Scene(function, input_grad, "start")]
        found.append(Scene(function, input_grad, "tokens"))
        found.append(Scene(function, input_grad, "gradients"))
    found += [Scene("backward", "complete", "backward"), Scene("backward", "sequence", "gradients", 2)]
    found += [Scene("backward", "sequence", "head", 2), Scene("backward", "sequence", "tokens", 1)]
    for function, input_grad in itertools.product(("mixture", "mixture-backward"), ("complete", "sequence")):
        found += [Scene(function, input_grad, "second", 1), Scene(function, input_grad, "gradients")]
    found += [Scene("logits", "complete", place) for place in ("statistics", "start", "tokens")]
    found += [Scene("forward", "complete", place) for place in ("arguments", "weights")]
    return found + own_scenes()


def own_scenes() -> list[Scene]:
    """Of ranks that have tokens of their own."""
    places = "arguments", "weights", "columns", "gathered", "sums", "tokens", "hidden", "gradients"
    found = [Scene("forward", "own", place) for place in places]
    found += [Scene("forward", "own", "statistics", 2), Scene("forward", "own", "head", 2)]
    for function, places in (("backward", ("start", "gradients")), ("logprobs", ("arguments", "statistics"))):
        found += [Scene(function, "own", place) for place in places]
        found += [Scene(function, "own", place, 1) for place in ("gathered", "tokens")]  # of the backward
    found += [Scene("mixture", "own", "second", 1), Scene("mixture-backward", "own", "gradients")]
    # Gradients that the forward computed, computed again since upstream gradients differ.
    recomputed = [("statistics", OWN_CHUNKS), ("gradients", OWN_CHUNKS), ("gathered", 1), ("sums", 1)]
    return found + [Scene("differing", "own", place, time) for place, time in recomputed]


class Call(NamedTuple):
    """A loss and its gradients."""

    scene: Scene
    vocab: VocabShard
    leaves: list[torch.Tensor]
    target: torch.Tensor

    @classmethod
    def of(cls, scene: Scene, rank: int, *, check: str = "first") -> "Call":
        case = problem(TOKENS, WIDTH, VOCAB, ignored=0.25)
        kind = {"tokens": "own"} if scene.input_grad == "own" else {"input_grad": scene.input_grad}
        vocab = VocabShard.split(VOCAB, check=check, **kind)
        tokens = slice(None)
        if scene.input_grad == "sequence":
            tokens = slice(rank * TOKENS // RANKS, (rank + 1) * TOKENS // RANKS)
        if scene.input_grad == "own":
            tokens = slice(OWN[rank], OWN[rank + 1])
        head = case.head.detach()[vocab.start : vocab.stop]
        hidden = case.hidden.detach()[tokens] if scene.function != "logits" else case.hidden.detach() @ head.t()
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        target = case.target[tokens] if scene.input_grad == "own" else case.target
        return cls(scene, vocab, leaves[:1] if scene.function == "logits" else leaves, target)

    def run(self) -> list[torch.Tensor]:
        ignored = {"ignored": self.scene.ignored}
        if self.scene.function == "logits":
            options = ChunkOptions(**ignored)
            value = cross_entropy(*self.leaves, self.target, vocab=self.vocab, options=options)
        elif self.scene.function == "logprobs":
            options = chunks(CHUNK, **ignored)
            value = linear_logprobs(*self.leaves, self.target, vocab=self.vocab, options=options).sum()
        elif self.scene.function.startswith("mixture"):
            way = "backward" if self.scene.function == "mixture-backward" else "forward"
            options = chunks(CHUNK, way, **ignored)
            hidden, *head = teacher_tensors(TOKENS, VOCAB)
            teacher = Teacher(hidden[: len(self.target)], *head)
            keywords = {"target": self.target, "beta": 0.4, "vocab": self.vocab, "options": options}
            value = linear_divergence(*self.leaves, teacher, **keywords)
        else:
            differing = self.scene.function == "differing"
            options = chunks(CHUNK, "forward" if differing else self.scene.function, **ignored)
            value = linear_cross_entropy(*self.leaves, self.target, vocab=self.vocab, options=options)
            if differing:
                value = value * (1 + self.vocab.ranks.index(dist.get_rank()))
        return [value.detach(), *torch.autograd.grad(value, self.leaves)]


@contextmanager
def out_of_memory(place: str, time: int):
    owner, name = PLACES[place]
    original, seen = getattr(owner, name), itertools.count()

    def replacement(*args, **keywords):
        if next(seen) == time:
            raise torch.OutOfMemoryError("a simulated one")
        return original(*args, **keywords)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def fails_and_works(scene: Scene, rank: int) -> Failure | str | None:
    """The error of a call in which the odd rank runs out of memory, if the calls around it are as they should be."""
    call = Call.of(scene, rank)
    expected = call.run()
    if rank == ODD_ONE:
        with out_of_memory(scene.place, scene.time):
            found = failure(call.run)
    else:
        found = failure(call.run)
    for again in (call, Call.of(scene, rank, check="always")):
        for one, other in zip(again.run(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    return found


def bad_target(function: str, input_grad: str, rank: int) -> Failure | None:
    """The odd rank alone has a target out of range, in a call that is not compared."""
    call = Call.of(Scene(function, input_grad, "target"), rank)
    expected = call.run()
    target = call.target
    if rank == ODD_ONE:
        last = int((target != -100).nonzero()[-1])
        target = torch.where(torch.arange(len(target)) == last, 10**6, target)
    found = failure(call._replace(target=target).run)
    assert torch.equal(call.run()[0], expected[0])
    return found


def attempt(function: Callable, *args) -> Failure | None:
    found = failure(lambda: attempt.results.append(function(*args)))
    return found._replace(type="in the test: " + found.type) if found is not None else attempt.results.pop()


attempt.results = []


def run_all(rank: int, world_size: int) -> dict:
    found = {scene: attempt(fails_and_works, scene, rank) for scene in scenes()}
    for function, input_grad in BAD_TARGETS:
        found["bad target", function, input_grad] = attempt(bad_target, function, input_grad, rank)
    return found | out_of_step.run_all(rank, attempt)
