"""Ranks that make different calls, or different numbers of them, and the calls after these, for `test_in_step.py`."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce import VocabShard, linear_cross_entropy, linear_logprobs
from tests.cases import chunks, problem
from tests.distributed.vocab_errors import Failure, failure

ODD_ONE = 1
VOCAB, WIDTH, TOKENS, CHUNK = 11, 5, 12, 6
TOKENS_OF, OWN = ("own", "same"), (0, 6, 7, 12)


class Step(NamedTuple):
    """What a rank calls; every rank has as many tokens in each call of a kind."""

    vocab: VocabShard
    leaves: list[Tensor]
    target: Tensor
    way: str

    def loss(self, way: str | None = None, chunk: int = CHUNK, **keywords) -> Tensor:
        options = chunks(chunk, way or self.way)
        return linear_cross_entropy(*self.leaves, self.target, vocab=self.vocab, options=options, **keywords)

    def logprobs(self) -> Tensor:
        return linear_logprobs(*self.leaves, self.target, vocab=self.vocab, options=chunks(CHUNK)).sum()

    def gradients(self, value: Tensor) -> list[Tensor]:
        return torch.autograd.grad(value, self.leaves, retain_graph=True)

    def results(self) -> list[Tensor]:
        value = self.loss()
        return [value.detach(), *self.gradients(value)]


def evaluated(step: Step) -> Tensor:
    with torch.no_grad():
        return step.loss()


# What all ranks have called before, what the odd one does then, and what the others do.
DIFFERENT = {
    "a forward in a backward": (Step.loss, lambda step, _: step.loss(), Step.gradients),
    "another function": (Step.loss, lambda step, _: step.logprobs(), lambda step, _: step.loss()),
    "an evaluation": (Step.loss, lambda step, _: evaluated(step), lambda step, _: step.loss()),
    "another objective": (Step.loss, lambda step, _: step.loss(z_loss=0.1), lambda step, _: step.loss()),
    "other chunks": (Step.loss, lambda step, _: step.loss(chunk=3), lambda step, _: step.loss()),
    "the other way": (Step.loss, lambda step, _: step.loss("backward"), lambda step, _: step.loss("forward")),
    "another call's backward": (
        lambda step: [step.loss(), step.loss()],
        lambda step, values: step.gradients(values[1]),
        lambda step, values: step.gradients(values[0]),
    ),
}


class Scene(NamedTuple):
    different: str
    tokens: str
    check: str
    way: str

    def __str__(self):
        return "-".join(self)


def scenes() -> list[Scene]:
    checks = ("always", "forward"), ("first", "forward"), ("first", "backward")
    every = (
        (different, tokens, *check) for different, tokens, check in itertools.product(DIFFERENT, TOKENS_OF, checks)
    )
    return [scene for scene in itertools.starmap(Scene, every) if not _is_alike(scene)]


def _is_alike(scene: Scene) -> bool:
    """Whether ranks do nothing together that differs."""
    of_statistics = scene.different in ("another function", "another objective")  # which are the same
    if scene.way == "backward":
        return of_statistics and scene.check == "first"
    return scene.tokens == "same" and "backward" in scene.different


def step_of(scene: Scene, rank: int) -> Step:
    case = problem(TOKENS, WIDTH, VOCAB, ignored=0.0)
    vocab = VocabShard.split(VOCAB, tokens=scene.tokens, check=scene.check)
    tokens = slice(OWN[rank], OWN[rank + 1]) if scene.tokens == "own" else slice(None)
    leaves = case.hidden.detach()[tokens], case.head.detach()[vocab.start : vocab.stop]
    return Step(vocab, [leaf.clone().requires_grad_() for leaf in leaves], case.target[tokens], scene.way)


def differs_and_works(scene: Scene, rank: int) -> Failure | str | None:
    """The error of what differs, if the calls around it are as they should be."""
    step = step_of(scene, rank)
    expected = step.results()
    before, odd, others = DIFFERENT[scene.different]
    values = before(step)
    found = failure(lambda: (odd if rank == ODD_ONE else others)(step, values))
    for one, other in zip(step.results(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return found


def run_all(rank: int, attempt: Callable) -> dict[Scene, Failure | None]:
    return {scene: attempt(differs_and_works, scene, rank) for scene in scenes()}
