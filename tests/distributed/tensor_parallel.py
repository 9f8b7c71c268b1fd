"""What the ranks of `test_tensor_parallel.py` run: models whose head ``ColwiseParallel`` of torch shards."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.integrations.training import largest_allocation

RANKS, BATCH, LENGTH, WIDTH = 2, 2, 64, 8
SIZES = {"even": 2048, "uneven": 2047}
OPTIONS = ChunkOptions(chunk_size=8)


class Model(nn.Module):
    """A decoder without attention, whose code knows nothing of ranks."""

    def __init__(self, vocab_size: int, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size, bias=bias)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.down(self.up(hidden).tanh())
        logits = self.head(self.norm(hidden))
        return logits if labels is None else F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


class Case(NamedTuple):
    head: dict  # arguments of ColwiseParallel
    body: str = "whole"
    tied: bool = False
    size: str = "uneven"
    bias: bool = False


WHOLE = {"output_layouts": Replicate()}
SHARDED = {"output_layouts": Shard(-1), "use_local_output": False}
OF_SEQUENCES = {"input_layouts": Shard(1)}
CASES = {
    "whole logits": Case(WHOLE, bias=True),
    "whole DTensor": Case(WHOLE | {"use_local_output": False}),
    "sharded DTensor": Case(SHARDED, size="even"),
    "local shards": Case({}),
    "layers": Case(WHOLE, "layers"),
    "sequence": Case(SHARDED | OF_SEQUENCES, "sequence", bias=True),
    "sequence, local": Case(WHOLE | OF_SEQUENCES, "sequence, local"),
    "embedding": Case(WHOLE, "embedding"),
    "tied": Case(WHOLE, "embedding", tied=True),
    "tied, sequence": Case(SHARDED | OF_SEQUENCES, "sequence", tied=True, size="even"),
}


def new_model(case: Case) -> Model:
    torch.manual_seed(0)
    model = Model(SIZES[case.size], case.bias).double()
    if case.tied:
        model.head.weight = model.embed.weight
    return model.train()


def batch(case: Case) -> tuple[Tensor, Tensor]:
    ids = torch.randint(SIZES[case.size], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, ::3] = -100
    return ids, labels


def plan(case: Case) -> dict:
    layers = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    sequence = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    bodies = {
        "whole": {},
        "layers": layers,
        "embedding": layers | {"embed": RowwiseParallel(input_layouts=Replicate())},
        "sequence": sequence | {"norm": SequenceParallel()},
        "sequence, local": sequence | {"norm": SequenceParallel(use_local_output=True)},
    }
    return bodies[case.body] | {"head": ColwiseParallel(**case.head)}


def parallelized(case: Case, order: str, mesh: Any, **keywords: Any) -> Model:
    """A model whose head is swapped ``before`` it is sharded, ``after`` it, or ``never``."""
    model = new_model(case)
    if order == "before":
        LMHead.wrap(model, **keywords)
    parallelize_module(model, mesh, plan(case))
    if case.tied:
        model.embed.weight = model.head.weight
    if order == "after":
        LMHead.wrap(model, **keywords)
    return model


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


def step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Step:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return Step(whole(loss.detach()), {name: whole(p.grad).clone() for name, p in model.named_parameters()})


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Trained(NamedTuple):
    is_lazy: bool
    step: Step
    largest: int  # bytes at once in a step
    said: list[str]
    evaluated: bool  # as the layer would


def trained(case: Case, order: str, mesh: Any) -> Trained:
    model, (ids, labels) = parallelized(case, order, mesh, options=OPTIONS), batch(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = []
        largest = largest_allocation(lambda: steps.append(step(model, lambda model: model(ids, labels))))
        is_lazy = type(model(ids)) is LazyLogits
    plain = parallelized(case, "never", mesh)
    found, expected = model.eval()(ids), plain.eval()(ids)
    same = type(found) is type(expected) and torch.equal(whole(found), whole(expected))
    return Trained(is_lazy, steps[0], largest, of_ours(caught), same)


def of_ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if re.search("LMHead|Lazy", str(one.message))]


# ---- other losses, and what is computed ----

LOSSES = {
    "log-probabilities": lambda z, y: z.log_softmax(-1).gather(-1, y[..., None]).square().sum(),
    "softcap": lambda z, y: F.cross_entropy(torch.tanh(z / 2).mul(2).flatten(0, 1), y.flatten(), reduction="sum"),
    "some tokens": lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "twice": lambda z, y: F.cross_entropy(z[0], y[0]) + 2 * F.cross_entropy(z[1], y[1]),
    "computed": lambda z, y: z.sin().mean() + F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "argmax": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()) + (z.argmax(-1) == y).double().mean(),
    "topk": lambda z, y: z.topk(3).values.sum(),
}
WARNED = {"computed": "sin", "topk": "topk"}
OF_LOSSES = CASES["sequence"]


def loss_with(name: str) -> Callable[[nn.Module], Tensor]:
    ids, labels = batch(OF_LOSSES)
    return lambda model: LOSSES[name](model(ids), labels.clamp(min=0))


def with_loss(name: str, mesh: Any) -> tuple[Step, list[str], int]:
    """The step, what was said, and the largest tensor in bytes."""
    model, steps = parallelized(OF_LOSSES, "after", mesh, options=OPTIONS), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        largest = largest_allocation(lambda: steps.append(step(model, loss_with(name))))
    return steps[0], of_ours(caught), largest


def other_ways(mesh: Any) -> dict[str, Any]:
    """The same step in other surroundings."""
    case = CASES["sharded DTensor"]
    ids, labels = batch(case)
    found = {}
    model = parallelized(case, "before", mesh)
    with loss_parallel():
        found["loss_parallel"] = step(model, lambda model: model(ids, labels))
    LMHead.unwrap(model)
    with loss_parallel():
        found["unwrapped"] = step(model, lambda model: F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()))
    found["class"] = type(model.head)
    always = parallelized(case, "after", mesh, lazy="always").eval()
    found["always"] = type(always(ids)) is LazyLogits, always(ids, labels).detach()
    with_fsdp = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    for unit in ("model", "head"):
        model = parallelized(case, "after" if unit == "model" else "before", with_fsdp["tensor"])
        if unit == "head":
            fully_shard(model.head, mesh=with_fsdp["data"])
        fully_shard(model, mesh=with_fsdp["data"])
        found[f"FSDP of the {unit}"] = step(model, lambda model: model(ids, labels))
    return found


# ---- what cannot be lazy ----


def refused(mesh: Any) -> dict[str, Any]:
    found = {}
    local = parallelized(CASES["local shards"], "after", mesh)
    ids, labels = batch(CASES["local shards"])
    found["shards"] = message_of(lambda: local(ids).sigmoid())
    found["shard"] = message_of(lambda: LMHead.shard(local))

    rowwise = {"head": RowwiseParallel(input_layouts=Replicate())}
    model = parallelize_module(new_model(CASES["layers"]), mesh, rowwise)
    found["rowwise"] = message_of(lambda: LMHead.wrap(model))
    model = parallelize_module(LMHead.wrap(new_model(CASES["layers"])), mesh, rowwise)
    found["rowwise later"] = said_twice(model, lambda model: model(ids, labels))

    by_tokens = Case({"output_layouts": Shard(1), "use_local_output": False}, size="even")
    model = parallelized(by_tokens, "after", mesh)
    found["sharded tokens"] = said_twice(model, lambda model: whole(model(*batch(by_tokens)[:1])).square().mean())
    model = parallelized(CASES["layers"], "after", mesh)
    model.head.register_forward_hook(lambda *_: None)
    found["a hook"] = said_twice(model, lambda model: model(ids, labels))
    return found


def said_twice(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> tuple[Step, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, loss_of)
        found = step(model, loss_of)
    return found, of_ours(caught)


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# ---- FSDP2 over ranks with other tokens ----


def data_batch(data_rank: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(SIZES[OF_LOSSES.size], (BATCH, LENGTH), generator=torch.Generator().manual_seed(data_rank))
    return ids, ids.roll(-1, 1)


def run_with_fsdp(rank: int, world_size: int) -> dict[str, Step]:
    mesh = init_device_mesh("cpu", (2, RANKS), mesh_dim_names=("data", "tensor"))
    found = {}
    for unit, order in (("model", "before"), ("head", "after")):
        model = parallelized(OF_LOSSES, order, mesh["tensor"], options=OPTIONS)
        if unit == "head":
            fully_shard(model.head, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        found[unit] = step(model, lambda model: model(*data_batch(mesh.get_local_rank("data"))))
    return found


def run_all(rank: int, world_size: int) -> dict:
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {(name, order): trained(CASES[name], order, mesh) for name in CASES for order in ("before", "after")}
    found |= {name: with_loss(name, mesh) for name in LOSSES}
    return found | other_ways(mesh) | refused(mesh)
