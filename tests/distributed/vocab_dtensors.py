"""What the ranks of `test_vocab_dtensor.py` run: heads that are DTensors."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from chunked_ce import VocabShard, linear_cross_entropy, linear_logprobs
from tests.cases import REDUCTIONS_AND_WAYS, array, assert_close, chunks, problem, random_like
from tests.distributed.vocab_errors import Failure, failure

# By name: the shape of the mesh, and the placements of the head.
PLACEMENTS = {
    "1-D mesh": ((4,), (Shard(0),)),
    "last dimension of a mesh": ((2, 2), (Replicate(), Shard(0))),
    "first dimension of a mesh": ((2, 2), (Shard(0), Replicate())),
    "middle dimension of a mesh": ((1, 4, 1), (Replicate(), Shard(0), Replicate())),
    "not sharded": ((2, 2), (Replicate(), Replicate())),
}
SIZES = {"even": 12, "uneven": 11, "empty": 5}
WRONG = {
    "columns": ((4,), (Shard(1),)),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "partial": ((4,), (Partial(),)),
}


def run_all(rank: int, world_size: int, folder: str) -> dict[str, Failure | None]:
    meshes = {
        shape: init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])
        for shape, _ in (PLACEMENTS | WRONG).values()
    }
    found = {}
    for name, (shape, placements) in PLACEMENTS.items():
        for size, vocab_size in SIZES.items():
            found[f"{name}, {size}"] = failure(lambda case=(meshes[shape], placements, vocab_size): _check(*case))
    for name, (shape, placements) in WRONG.items():
        found[name] = failure(lambda mesh=meshes[shape], placements=placements: _wrong(mesh, placements))
    found["with a VocabShard"] = failure(lambda: _with_a_shard(meshes[(4,)]))
    found["logprobs"] = failure(lambda: _logprobs(meshes[(2, 2)]))
    # Another world: nothing is remembered of the first one's groups.
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    again = init_device_mesh("cpu", (4,), mesh_dim_names=("a",))
    found["in another world"] = failure(lambda: _check(again, (Shard(0),), SIZES["uneven"]))
    return found


def _leaf(values: torch.Tensor, mesh, placements) -> DTensor:
    return distribute_tensor(values.detach(), mesh, placements).requires_grad_()


def _check(mesh, placements, vocab_size: int) -> None:
    case = problem(12, 5, vocab_size, dtype=torch.float64, bias=True)
    weight = torch.linspace(0.5, 1.5, vocab_size, dtype=torch.float64)
    expected = case.rows(label_smoothing=0.1, weight=weight)
    results = []
    for reduction, way in REDUCTIONS_AND_WAYS:
        hidden = case.hidden.detach().clone().requires_grad_()
        head, bias = _leaf(case.head, mesh, placements), _leaf(case.bias, mesh, placements)
        options = chunks(4, way)
        value = linear_cross_entropy(
            hidden,
            head,
            case.target,
            linear_bias=bias,
            weight=weight,
            label_smoothing=0.1,
            reduction=reduction,
            options=options,
        )
        upstream = random_like(value)
        found = torch.autograd.grad(value, [hidden, head, bias], upstream)
        whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in found]
        results.append((reduction, value, upstream, found, whole))
    for reduction, value, upstream, found, whole in results:
        assert not isinstance(value, DTensor)
        assert_close(value, *expected.reduce(reduction), torch.float64)
        assert type(found[0]) is torch.Tensor
        for gradient in found[1:]:
            assert isinstance(gradient, DTensor) and gradient.placements == placements
            assert gradient.device_mesh == mesh
        coefficient = array(upstream) * expected.coefficient(reduction)
        exact = expected.gradients("loss", array(case.hidden), array(case.head), coefficient)
        for gradient, (values, scale) in zip(whole, exact, strict=True):
            assert_close(gradient, values, scale, torch.float64, "gradient")


def _wrong(mesh, placements) -> None:
    head = DTensor.from_local(torch.randn(4, 4), mesh, placements)
    linear_cross_entropy(torch.randn(3, 4), head, torch.tensor([1, 2, 3]))


def _with_a_shard(mesh) -> None:
    case = problem(12, 5, 11, dtype=torch.float64)
    hidden = case.hidden.detach().clone().requires_grad_()
    head = _leaf(case.head, mesh, (Shard(0),))
    vocab = VocabShard.from_dtensor(head, input_grad="partial")
    linear_cross_entropy(hidden, head, case.target, vocab=vocab, reduction="sum").backward()
    dist.all_reduce(hidden.grad)
    (exact, scale), *_ = case.rows().gradients("loss", array(case.hidden), array(case.head), array(torch.ones(12)))
    assert_close(hidden.grad, exact, scale, torch.float64)


def _logprobs(mesh) -> None:
    case = problem(12, 5, 11, dtype=torch.float64)
    hidden = case.hidden.detach().clone().requires_grad_()
    head = _leaf(case.head, mesh, (Replicate(), Shard(0)))
    values, entropies = linear_logprobs(hidden, head, case.target, return_entropy=True)
    (gradient,) = torch.autograd.grad(entropies.sum(), head)
    whole = gradient.full_tensor()
    rows = case.rows()
    assert_close(values, rows.logprob, rows.logprob_scale, torch.float64)
    assert_close(entropies, rows.entropy, rows.entropy_scale, torch.float64)
    _, (exact, scale), _ = rows.gradients("entropy", array(case.hidden), array(case.head), array(torch.ones(12)))
    assert gradient.placements == (Replicate(), Shard(0))
    assert_close(whole, exact, scale, torch.float64)
