"""What the ranks of `test_vocab_placements.py` run: DTensors of all placements, and heads that FSDP shards."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from chunked_ce import (
    LinearCrossEntropyLoss,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
)
from tests.distributed.vocab_errors import failure

RANKS, TOKENS, WIDTH, VOCAB = 4, 8, 4, 11
FLAT, GRID = (RANKS,), (2, 2)
PAIR = (2,)  # two of the ranks: compiling takes seconds on each
SHARDED = {FLAT: (Shard(0),), GRID: (Replicate(), Shard(0))}  # heads

# Of the hidden states, by mesh: all that stand for the whole or are gathered over the ranks of the vocabulary.
RIGHT = {
    FLAT: [(Replicate(),), (Partial(),), (Shard(0),), (Shard(1),)],
    GRID: [
        (Replicate(), Replicate()),
        (Replicate(), Partial()),
        (Partial(), Replicate()),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
    ],
}
REFUSED = {"tokens over data ranks": (Shard(0), Replicate()), "tokens over all ranks": (Shard(0), Shard(0))}
FUNCTIONS = ("mean", "sum", "none", "logprobs", "module")


def problem():
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.tensor([0, 10, 3, -100, 5, 1, 9, 4])
    return values(TOKENS, WIDTH), values(VOCAB, WIDTH), values(VOCAB), target


def weights():
    return torch.linspace(0.5, 2, VOCAB).double(), torch.linspace(1, 3, TOKENS).double()


def plain(function: str, hidden, head, bias, target) -> Tensor:
    logits = F.linear(hidden, head, bias)
    if function == "logprobs":
        return -F.cross_entropy(logits, target, reduction="none")
    classes, tokens = weights()
    losses = F.cross_entropy(logits, target, reduction="none", weight=classes, label_smoothing=0.1) * tokens
    counted = target != -100
    denominator = (classes[target.where(counted, 0)] * tokens)[counted].sum()
    return {"sum": losses.sum(), "none": losses}.get(function, losses.sum() / denominator)


def ours(function: str, hidden, head, bias, target, classes, tokens, **keywords) -> Tensor:
    if function == "logprobs":
        return linear_logprobs(hidden, head, target, linear_bias=bias, **keywords)
    if function == "module":
        loss = LinearCrossEntropyLoss(weight=classes, label_smoothing=0.1, **keywords)
        return loss(hidden, head, target, linear_bias=bias, token_weight=tokens)
    keywords |= {"weight": classes, "token_weight": tokens, "label_smoothing": 0.1, "reduction": function}
    return linear_cross_entropy(hidden, head, target, linear_bias=bias, **keywords)


def placed(values: Tensor, mesh, placements) -> DTensor:
    """A leaf that stands for ``values``."""
    if not any(placement.is_partial() for placement in placements):
        leaf = distribute_tensor(values, mesh, placements)
    else:
        split = [Replicate() if placement.is_partial() else placement for placement in placements]
        share = distribute_tensor(values, mesh, split).to_local()
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                share = share * (mesh.get_local_rank(dim) + 1) / sum(range(1, mesh.size(dim) + 1))
        leaf = DTensor.from_local(share, mesh, placements, shape=values.shape, stride=values.stride())
    return leaf.requires_grad_(values.is_floating_point())


def whole(value) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def compare(value: Tensor, leaves: list, expected: Tensor, plain_leaves: list) -> None:
    assert not isinstance(value, DTensor)
    upstream = torch.linspace(1, 2, value.numel()).double().reshape(value.shape)
    found = torch.autograd.grad(value, leaves, upstream)
    exact = torch.autograd.grad(expected, plain_leaves, upstream)
    gathered = [whole(gradient) for gradient in found]  # on every rank, before one of them may fail
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for leaf, gradient, values, other in zip(leaves, found, gathered, exact, strict=True):
        assert isinstance(gradient, DTensor) == isinstance(leaf, DTensor)
        torch.testing.assert_close(values, other, rtol=1e-11, atol=1e-12)


def check(function: str, mesh, of_hidden, of_head, of_bias, of_target) -> None:
    hidden, head, bias, target = problem()
    plain_leaves = [values.clone().requires_grad_() for values in (hidden, head, bias)]
    expected = plain(function, *plain_leaves, target)
    leaves = [placed(v, mesh, p) for v, p in ((hidden, of_hidden), (head, of_head), (bias, of_bias))]
    replicated = [Replicate()] * mesh.ndim
    classes, tokens = (distribute_tensor(values, mesh, replicated) for values in weights())
    value = ours(function, *leaves, distribute_tensor(target, mesh, of_target), classes, tokens)
    compare(value, leaves, expected, plain_leaves)


def check_logits(mesh, placements, reduction: str) -> None:
    hidden, head, bias, target = problem()
    logits = F.linear(hidden, head, bias)
    twin = logits.clone().requires_grad_()
    leaf = placed(logits, mesh, placements)
    whole_target = distribute_tensor(target, mesh, [Replicate()] * mesh.ndim)
    keywords = {"reduction": reduction, "label_smoothing": 0.1}
    value = cross_entropy(leaf, whole_target, **keywords)
    compare(value, [leaf], F.cross_entropy(twin, target, **keywords), [twin])


def check_input_grad(mesh, input_grad: str, placements) -> None:
    """A shard that says how its input is sharded, or its gradient summed."""
    hidden, head, _, target = problem()
    twins = [values.clone().requires_grad_() for values in (hidden, head)]
    leaf, rows = placed(hidden, mesh, placements), placed(head, mesh, SHARDED[GRID])
    vocab = VocabShard.from_dtensor(rows, input_grad=input_grad)
    value = linear_cross_entropy(leaf, rows, target, vocab=vocab)
    compare(value, [leaf, rows], F.cross_entropy(F.linear(*twins), target), twins)


def check_summed_count(mesh) -> None:
    """`num_tokens` that is still to be summed over the ranks."""
    hidden, head, _, target = problem()
    count = DTensor.from_local(torch.tensor(5.0), mesh, [Partial()])
    value = linear_cross_entropy(hidden, placed(head, mesh, [Shard(0)]), target, num_tokens=count)
    torch.testing.assert_close(value, F.cross_entropy(F.linear(hidden, head), target, reduction="sum") / 20)


def refused(mesh, name: str, placements) -> None:
    hidden, head, _, target = problem()
    given = {"input": hidden, "linear_weight": head, "target": target, "token_weight": weights()[1]}
    if name == "logits":
        given = {"logits": F.linear(hidden, head), "target": target}
    given[name] = distribute_tensor(given[name], mesh, placements)
    (cross_entropy if name == "logits" else linear_cross_entropy)(**given)


def dtensors(mesh) -> tuple[DTensor, DTensor, Tensor]:
    hidden, head, _, target = problem()
    return placed(hidden, mesh, [Replicate()]), placed(head, mesh, [Shard(0)]), target


def compiled(mesh) -> None:
    torch._dynamo.reset()
    hidden, head, bias, target = problem()
    function = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for placements in ((Replicate(), Replicate()), (Replicate(), Partial())):
        twins = [values.clone().requires_grad_() for values in (hidden, head, bias)]
        leaves = [placed(hidden, mesh, placements), *(placed(v, mesh, SHARDED[GRID]) for v in (head, bias))]
        value = function(leaves[0], leaves[1], target, linear_bias=leaves[2])
        compare(value, leaves, F.cross_entropy(F.linear(*twins), target), twins)


def compiled_logits(mesh) -> None:
    torch._dynamo.reset()
    hidden, head, _, target = problem()
    logits = F.linear(hidden, head)
    twin = logits.clone().requires_grad_()
    leaf = placed(logits, mesh, [Shard(1)])
    value = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(leaf, target)
    compare(value, [leaf], F.cross_entropy(twin, target), [twin])


# ---- heads that FSDP shards ----


ALIVE = []  # FSDP forgets about the parameters of a model that is gone


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        hidden = self.body(hidden)
        if target is None:
            return hidden
        return linear_cross_entropy(hidden, self.head.weight, target, linear_bias=self.head.bias)


def sharded_model(mesh, *, tensor_parallel=None) -> Model:
    model = Model()
    if tensor_parallel is not None:
        parallelize_module(model.head, tensor_parallel, ColwiseParallel())
    fully_shard(model.head, mesh=mesh)
    ALIVE.append(model)
    return fully_shard(model, mesh=mesh)


def tokens_of_rank():
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    return hidden, torch.arange(TOKENS) + dist.get_rank() % 3


def after_a_step(model: Model) -> Model:
    output = model(tokens_of_rank()[0])
    F.linear(output, torch.ones(3, WIDTH)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.1).step()
    model.head.reshard()
    return model


def after_loading(model: Model, assign: bool) -> Model:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    return model


def loss_of_head(weight: Tensor, bias: Tensor | None = None, function=linear_cross_entropy) -> Tensor:
    hidden, target = tokens_of_rank()
    return function(hidden.to(weight.dtype), weight, target, linear_bias=bias)


def by_fsdp(meshes) -> dict[str, Callable]:
    grid, flat, pair = meshes[GRID], meshes[FLAT], meshes[PAIR]
    fullgraph = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with_breaks = torch.compile(linear_cross_entropy, backend="aot_eager")

    def of_cast(hidden, weight, target, linear_bias):
        return linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target, linear_bias=linear_bias)

    hidden, target = tokens_of_rank()
    return {
        "weight": lambda: loss_of_head(sharded_model(flat).head.weight),
        "default mesh": lambda: loss_of_head(sharded_model(None).head.weight),
        "a single unit": lambda: loss_of_head(fully_shard(Model(), mesh=flat).head.weight),
        "hybrid": lambda: loss_of_head(sharded_model(grid).head.weight),
        "with tensor parallelism": lambda: loss_of_head(
            sharded_model(grid["data"], tensor_parallel=grid["tensor"]).head.weight
        ),
        "after a step": lambda: loss_of_head(after_a_step(sharded_model(flat)).head.weight),
        "after loading": lambda: loss_of_head(after_loading(sharded_model(flat), False).head.weight),
        "after assigning": lambda: loss_of_head(after_loading(sharded_model(flat), True).head.weight),
        "after a change of dtype": lambda: loss_of_head(sharded_model(flat).double().head.weight),
        "detached": lambda: loss_of_head(sharded_model(flat).head.weight.detach()),
        "cast": lambda: loss_of_head(sharded_model(flat).head.weight.bfloat16()),
        "log-probabilities": lambda: linear_logprobs(hidden, sharded_model(flat).head.weight, target),
        "module": lambda: LinearCrossEntropyLoss()(hidden, sharded_model(flat).head.weight, target),
        "from_dtensor": lambda: VocabShard.from_dtensor(sharded_model(flat).head.weight),
        "bias": lambda: loss_of_head(torch.randn(VOCAB, WIDTH), sharded_model(flat).head.bias),
    } | (
        {
            "compiled": lambda: loss_of_head(sharded_model(pair).head.weight, function=with_breaks),
            "compiled, full graph": lambda: loss_of_head(sharded_model(pair).head.weight, function=fullgraph),
            "compiled, cast": lambda: loss_of_head(
                sharded_model(pair).head.weight, function=torch.compile(of_cast, backend="aot_eager")
            ),
        }
        if pair.get_coordinate() is not None
        else {}
    )


def beside_fsdp(meshes) -> None:
    """Heads of tensor parallelism stay shards of the vocabulary where FSDP shards others of their shape and mesh."""
    other = sharded_model(meshes[FLAT])
    check("mean", meshes[FLAT], (Replicate(),), (Shard(0),), (Shard(0),), (Replicate(),))
    head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    whole_head = [parameter.detach().clone() for parameter in head.parameters()]
    parallelize_module(head, meshes[FLAT], ColwiseParallel())
    hidden, _, _, target = problem()
    value = linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias)
    torch.testing.assert_close(value, F.cross_entropy(F.linear(hidden, *whole_head), target))
    assert isinstance(other.head.weight, DTensor)


def inside_forward(meshes, *, tensor_parallel: bool) -> None:
    """Where FSDP has the head whole, or as tensor parallelism shards it, the loss is that of the whole head."""
    grid = meshes[GRID]
    model = sharded_model(grid["data"], tensor_parallel=grid["tensor"] if tensor_parallel else None)
    reference = Model()
    generator = torch.Generator().manual_seed(grid.get_local_rank("data"))
    hidden, target = torch.randn(TOKENS, WIDTH, generator=generator), torch.arange(TOKENS)
    model.head.unshard()
    loss = model(hidden, target)
    expected = reference(hidden, target)
    torch.testing.assert_close(loss, expected)


def by_fsdp_of_old(*, use_orig_params: bool) -> None:
    """A head that `FullyShardedDataParallel` has put away."""
    model = FullyShardedDataParallel(Model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    loss_of_head(model.module.head.weight)


def run_all(rank: int, world_size: int) -> dict:
    meshes = {
        FLAT: init_device_mesh("cpu", FLAT, mesh_dim_names=("tensor",)),
        GRID: init_device_mesh("cpu", GRID, mesh_dim_names=("data", "tensor")),
    }
    found = {}
    for shape, mesh in meshes.items():
        replicated, sharded = (Replicate(),) * mesh.ndim, SHARDED[shape]
        for at, of_hidden in enumerate(RIGHT[shape]):
            function = FUNCTIONS[at % len(FUNCTIONS)]
            for of_bias in (sharded, replicated):
                for of_target in (replicated, sharded):
                    case = (function, mesh, of_hidden, sharded, of_bias, of_target)
                    found["right", shape, of_hidden, of_bias, of_target] = failure(lambda case=case: check(*case))
        for of_hidden in (replicated, (Partial(), *replicated[1:])):
            case = ("mean", mesh, of_hidden, replicated, replicated, replicated)
            found["whole head", shape, of_hidden] = failure(lambda case=case: check(*case))
    logits = [(FLAT, (Shard(1),)), (FLAT, (Partial(),)), (FLAT, (Replicate(),))]
    logits += [(GRID, (Replicate(), Shard(1))), (GRID, (Shard(1), Partial()))]
    for shape, placements in logits:
        for reduction in ("mean", "none"):
            case = (meshes[shape], placements, reduction)
            found["logits", shape, placements, reduction] = failure(lambda case=case: check_logits(*case))
    for input_grad, placements in (
        ("partial", (Replicate(), Replicate())),
        ("partial", (Partial(), Replicate())),
        ("sequence", (Replicate(), Shard(0))),
    ):
        case = (meshes[GRID], input_grad, placements)
        found["input_grad", input_grad, placements] = failure(lambda case=case: check_input_grad(*case))
    found["num_tokens"] = failure(lambda: check_summed_count(meshes[FLAT]))
    found["compiled", "head"] = failure(lambda: compiled(meshes[GRID]))
    meshes[PAIR] = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tensor",))
    if meshes[PAIR].get_coordinate() is not None:
        found["compiled", "logits"] = failure(lambda: compiled_logits(meshes[PAIR]))
    for name in ("input", "target", "token_weight", "logits"):
        for what, placements in REFUSED.items():
            case = (meshes[GRID], name, placements)
            found["refused", name, what] = failure(lambda case=case: refused(*case))
    found["wrong vocab"] = failure(lambda: linear_cross_entropy(*dtensors(meshes[FLAT]), vocab=(0, 3, 11)))
    for what, function in by_fsdp(meshes).items():
        torch._dynamo.reset()
        found["fsdp", what] = failure(function)
    found["beside fsdp"] = failure(lambda: beside_fsdp(meshes))
    for tensor_parallel in (False, True):
        found["inside", tensor_parallel] = failure(lambda t=tensor_parallel: inside_forward(meshes, tensor_parallel=t))
    for use_orig_params in (True, False):
        found["fsdp1", use_orig_params] = failure(lambda u=use_orig_params: by_fsdp_of_old(use_orig_params=u))
    return found
