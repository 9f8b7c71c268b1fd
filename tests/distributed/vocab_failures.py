"""What the ranks of `test_in_step.py` run: calls in which one rank fails alone, and the calls after them."""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch

from chunked_ce import (
    ChunkOptions,
    Teacher,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
)
from chunked_ce.engine import sources, sweep
from chunked_ce.engine.gradient_products import ChunkProducts
from chunked_ce.rows import torch_rows as rows
from tests.cases import chunks, problem
from tests.distributed.vocab_errors import Failure, failure
from tests.objectives.teachers import teacher_tensors

RANKS, ODD_ONE = 3, 1
VOCAB, WIDTH, TOKENS, CHUNK = 11, 5, 24, 6

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
}


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
            *itertools.product(("statistics", "gradients", "head"), (0, 1, 2)),
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
    return found + [Scene("logits", "complete", place) for place in ("statistics", "start", "tokens")]


class Call(NamedTuple):
    """A loss and its gradients."""

    scene: Scene
    vocab: VocabShard
    leaves: list[torch.Tensor]
    target: torch.Tensor

    @classmethod
    def of(cls, scene: Scene, rank: int, *, check: str = "first") -> "Call":
        case = problem(TOKENS, WIDTH, VOCAB, ignored=0.25)
        vocab = VocabShard.split(VOCAB, input_grad=scene.input_grad, check=check)
        tokens = slice(None)
        if scene.input_grad == "sequence":
            tokens = slice(rank * TOKENS // RANKS, (rank + 1) * TOKENS // RANKS)
        head = case.head.detach()[vocab.start : vocab.stop]
        hidden = case.hidden.detach()[tokens] if scene.function != "logits" else case.hidden.detach() @ head.t()
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        return cls(scene, vocab, leaves[:1] if scene.function == "logits" else leaves, case.target)

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
            teacher = Teacher(*teacher_tensors(TOKENS, VOCAB))
            keywords = {"target": self.target, "beta": 0.4, "vocab": self.vocab, "options": options}
            value = linear_divergence(*self.leaves, teacher, **keywords)
        else:
            options = chunks(CHUNK, self.scene.function, **ignored)
            value = linear_cross_entropy(*self.leaves, self.target, vocab=self.vocab, options=options)
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


def bad_target(function: str, rank: int) -> Failure | None:
    """The odd rank alone has a target out of range, in a call that is not compared."""
    call = Call.of(Scene(function, "complete", "target"), rank)
    expected = call.run()
    target = call.target
    if rank == ODD_ONE:
        target = torch.where(torch.arange(TOKENS) == int((target != -100).nonzero()[4]), 10**6, target)
    found = failure(call._replace(target=target).run)
    assert torch.equal(call.run()[0], expected[0])
    return found


def attempt(function: Callable, *args) -> Failure | None:
    found = failure(lambda: attempt.results.append(function(*args)))
    return found._replace(type="in the test: " + found.type) if found is not None else attempt.results.pop()


attempt.results = []


def run_all(rank: int, world_size: int) -> dict:
    found = {scene: attempt(fails_and_works, scene, rank) for scene in scenes()}
    for function in ("forward", "backward", "logprobs", "logits"):
        found["bad target", function] = attempt(bad_target, function, rank)
    return found
