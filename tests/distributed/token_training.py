"""One optimizer step of a small language model, to compare ranks with one process on the whole batch.

The optimizer is SGD: its step is lr times the gradient, so a gradient that is too large by some factor shows.
Adam's step does not depend on the gradient's scale and would hide it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chunked_ce

VOCAB, HIDDEN, BATCH, LENGTH = 61, 16, 2, 7
LEARNING_RATE = 100.0  # a step at least as large as the parameters, or their rounding would drown its error

# Counted tokens (of BATCH * LENGTH) by rank and micro-batch.
COUNTED = {
    "uneven": [[13, 5, 2], [1, 9, 0]],
    "idle rank": [[0, 0, 0], [6, 1, 14]],
    "nothing": [[0, 0, 0], [0, 0, 0]],
}

Window = list[tuple[Tensor, Tensor]]  # micro-batches of tokens and targets, both (BATCH, LENGTH)
State = dict[str, Tensor]


class LanguageModel(nn.Module):
    """Returns the sum of the losses of its counted tokens."""

    def __init__(self, **loss_keywords):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.loss_keywords = loss_keywords

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(tokens)))

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return chunked_ce.linear_cross_entropy(
            self.hidden(tokens), self.head.weight, target, reduction="sum", **self.loss_keywords
        )


def new_model(**loss_keywords) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**loss_keywords)


def window(data: str, rank: int, steps: int) -> Window:
    """The first `steps` micro-batches of a rank."""
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for counted in COUNTED[data][rank][:steps]:
        tokens, target = torch.randint(VOCAB, (2, BATCH, LENGTH), generator=generator)
        ignored = torch.randperm(BATCH * LENGTH, generator=generator)[counted:]
        target.view(-1)[ignored] = -100
        batches.append((tokens, target))
    return batches


def whole_batch(data: str, steps: int) -> Window:
    return [batch for rank in range(len(COUNTED[data])) for batch in window(data, rank, steps)]


def one_process(batches: Window, dtype: torch.dtype, start: torch.dtype | None = None) -> tuple[State, float]:
    """Parameters after the step and the mean loss, by plain PyTorch in `dtype`.

    As mixed precision does, the step is taken in fp32 (float64 for float64) from gradients in `dtype`, to
    which every micro-batch adds. `start`: the dtype that the initial parameters are rounded to, else `dtype`.
    """
    model = new_model().to(start or dtype).to(dtype)
    num_tokens = sum((target != -100).sum() for _, target in batches)
    loss = 0.0
    for tokens, target in batches:
        logits = F.linear(model.hidden(tokens), model.head.weight)
        logits = logits if dtype == torch.float64 else logits.float()
        loss_sum = F.cross_entropy(logits.view(-1, VOCAB), target.view(-1), reduction="sum")
        mean = loss_sum / num_tokens.clamp(min=1)
        mean.backward()
        loss += mean.item()
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: parameter.detach().to(master) - LEARNING_RATE * parameter.grad.to(master)
        for name, parameter in model.named_parameters()
    }, loss


def step_error(state: State, exact: State, start: torch.dtype) -> float:
    """The largest relative error of a parameter's step, against the exact step in float64."""
    initial = new_model().to(start).double().state_dict()
    return max(
        ((state[name].double() - exact[name]).norm() / (exact[name] - initial[name]).norm()).item() for name in exact
    )


def mean_of_micro_batch(target: Tensor) -> Callable[[Tensor], Tensor]:
    """The usual loss, which averages each micro-batch by itself."""
    return lambda loss_sum: loss_sum / (target != -100).sum().clamp(min=1)
