"""What the ranks of test_verl.py run."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from chunked_ce.integrations import verl as ours

TOKENS, WIDTH, VOCAB = 12, 16, 40


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=g)
    ids = torch.randint(VOCAB, (2, TOKENS // 2), generator=g)
    upstream = torch.rand(2, TOKENS, generator=g) + 0.5
    return hidden, torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9)) / 2, ids, upstream


def tensor_parallel(rank, world_size):
    """Values and gradients of verl's kernel signature with a group, for both kinds of the input's gradient.

    And those of a head that is a DTensor.
    """
    hidden, weight, ids, upstream = problem()
    temperature, found = torch.tensor([0.7, 1.3]), {}
    for input_grad in ("partial", "complete"):
        mine = hidden.clone().requires_grad_()
        rows = weight.chunk(world_size)[rank].clone().requires_grad_()
        outputs = ours.linear_cross_entropy(
            *(mine, rows, ids, temperature, "none", dist.group.WORLD), input_grad=input_grad
        )
        torch.autograd.backward(outputs, list(upstream))
        found[input_grad] = [x.detach() for x in outputs], mine.grad, rows.grad
    mine = hidden.clone().requires_grad_()
    mesh = init_device_mesh("cpu", (world_size,))
    head = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    outputs = [x.view(-1) for x in ours.FusedLinearForPPO()(mine, head, ids, temperature)]
    torch.autograd.backward(outputs, list(upstream))
    found["dtensor"] = [x.detach() for x in outputs], mine.grad, head.grad.to_local()
    return found


def fsdp_head(rank, world_size):
    """The loss of a head that FSDP2 leaves sharded: this rank's outputs and rows of the gradient."""
    hidden, weight, ids, upstream = problem(seed=rank)
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    fully_shard(head)
    outputs = ours.FusedLinearForPPO()(hidden, head.weight, ids, 0.8)
    torch.autograd.backward(outputs, [one.view(ids.shape) for one in upstream])
    return [x.detach() for x in outputs], head.weight.grad.full_tensor()
