"""A byte-level language model on the text of Python's reference: on a mesh of ranks, and on one process."""

import contextlib
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from chunked_ce import ChunkOptions, TokenMean, VocabShard, linear_cross_entropy

DATA, TENSOR = 2, 2
STEPS, MICRO_BATCHES, BATCH, LENGTH = 12, 2, 4, 32
WORDS, HIDDEN = 131, 32  # an odd number of words: uneven shards
LEARNING_RATE = 1.0

Windows = list[list[tuple[Tensor, Tensor]]]  # micro-batches of tokens and targets (BATCH, LENGTH) of each step


def text() -> Tensor:
    data = "".join(topics[name] for name in sorted(topics)[:20]).encode("ascii", errors="ignore")
    return torch.tensor(list(data))


def windows(data_rank: int) -> Windows:
    """What one data-parallel rank trains on: as many tokens count as its random prompts leave."""
    generator = torch.Generator().manual_seed(data_rank)
    data, steps = text(), []
    for _ in range(STEPS):
        steps.append([])
        for _ in range(MICRO_BATCHES):
            starts = torch.randint(len(data) - LENGTH - 1, (BATCH, 1), generator=generator)
            rows = data[starts + torch.arange(LENGTH + 1)]
            prompts = torch.randint(LENGTH + 1, (BATCH, 1), generator=generator)
            target = rows[:, 1:].masked_fill(torch.arange(LENGTH) < prompts, -100)
            steps[-1].append((rows[:, :-1], target))
    return steps


class LanguageModel(nn.Module):
    """Returns the sum of the losses. The head's rows are those of the shard."""

    def __init__(self, vocab: VocabShard | None = None, **keywords):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.body = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        head = nn.Linear(HIDDEN, WORDS, bias=False).weight.detach()
        self.head = nn.Parameter(head if vocab is None else head[vocab.start : vocab.stop].clone())
        self.vocab, self.keywords = vocab, keywords

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = self.body(self.embedding(tokens))[0]
        if self.vocab is None:
            return F.cross_entropy((hidden @ self.head.t()).flatten(0, 1), target.flatten(), reduction="sum")
        return linear_cross_entropy(hidden, self.head, target, vocab=self.vocab, reduction="sum", **self.keywords)


def train_on_a_mesh(rank: int, world_size: int, gradients: str) -> tuple[list[float], dict[str, Tensor]]:
    """The reported loss of each step, and the parameters in the end, the head's rows of this rank among them."""
    mesh = init_device_mesh("cpu", (DATA, TENSOR), mesh_dim_names=("data", "tensor"))
    vocab = VocabShard.split(WORDS, mesh.get_group("tensor"))
    model = LanguageModel(vocab, options=ChunkOptions(chunk_size=24, gradients=gradients))
    averaging = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("data"))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for window in windows(mesh.get_local_rank("data")):
        mean = TokenMean.over([target for _, target in window], group=mesh.get_group("data"))
        optimizer.zero_grad()
        loss_sums = []
        for last, (tokens, target) in enumerate(window, 1 - len(window)):
            with contextlib.nullcontext() if last == 0 else averaging.no_sync():
                loss_sums.append(averaging(tokens, target))
                mean(loss_sums[-1]).backward()
        optimizer.step()
        losses.append(mean.report(loss_sums).item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def both_ways(rank: int, world_size: int):
    return {gradients: train_on_a_mesh(rank, world_size, gradients) for gradients in ("forward", "backward")}


def train_on_one_process() -> tuple[list[float], dict[str, Tensor]]:
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for parts in zip(*map(windows, range(DATA)), strict=True):
        tokens, target = (torch.cat([pair[i] for window in parts for pair in window]) for i in range(2))
        loss = model(tokens, target) / (target != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}
