"""The parts of ``chunked-ce check`` that need other processes: two ranks over gloo, DeepSpeed, Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce import ChunkOptions, TokenMean, VocabShard, linear_cross_entropy
from chunked_ce.cli import objective_checks
from chunked_ce.cli.accuracy import gradient_of
from chunked_ce.cli.processes import Member, Processes, failed
from chunked_ce.cli.self_checks import CHUNK, OPTIONS, VOCAB, CheckInputs, Row, compare, plain, small_cases

__all__ = ["deepspeed_rows", "interpreted_rows", "sharded_rows"]

RANKS = 2
# In bf16 those alone that send something besides what all send: many CPUs take tens of times longer for its products.
_OBJECTIVES = {
    torch.float32: tuple(objective_checks.CASES),
    torch.bfloat16: ("KL divergence", "top-k divergence", "statistics per token"),
}


def interpreted_rows(timeout: float) -> list[Row]:
    """The Triton kernels in their interpreter, on a CPU."""
    with _environment(TRITON_INTERPRET="1"):
        return _run(_interpreted, 1, timeout)


def sharded_rows(timeout: float) -> list[Row]:
    """The vocabulary sharded over two processes, and the token-weighted mean over them."""
    return _run(_sharded, RANKS, timeout)


def deepspeed_rows(timeout: float) -> list[Row]:
    """The token-weighted mean under DeepSpeed on two processes."""
    with _environment(DS_ACCELERATOR="cpu"):
        return _run(_deepspeed, RANKS, timeout)


def _interpreted(member: Member) -> Iterator[Row]:
    for dtype in (torch.float32, torch.float16):  # to bf16 the interpreter truncates, where devices round
        yield from small_cases("cpu", dtype, "triton")


def _sharded(member: Member) -> Iterator[Row]:
    member.join()
    rank = member.rank
    for dtype in (torch.float32, torch.bfloat16):
        inputs = CheckInputs.random(dtype, "cpu")
        where = f"2 gloo processes, {str(dtype).removeprefix('torch.')}"
        for gradients in ("forward", "backward"):
            options = ChunkOptions(chunk_size=CHUNK, gradients=gradients)
            yield from _vocab_parallel(inputs, f"{where}, {gradients}", options)
            shard = VocabShard.split(VOCAB)
            names = _OBJECTIVES[dtype]
            yield from objective_checks.sharded_cases(inputs, f"{where}, sharded, {gradients}", options, shard, names)
            yield from _with_own_tokens(rank, inputs, f"{where}, {gradients}", options)
        yield from _parts_of_gradients(rank, inputs, where)
        yield from _token_mean(rank, inputs, where)


def _vocab_parallel(inputs: CheckInputs, where: str, options: ChunkOptions) -> Iterator[Row]:
    vocab = VocabShard.split(VOCAB)
    rows = slice(vocab.start, vocab.stop)
    shard = inputs._replace(head=inputs.head[rows], linear_bias=inputs.linear_bias[rows])

    def run(loss: Callable[..., Tensor], given: CheckInputs) -> tuple[Tensor, ...]:
        own = given.leaves()
        value = loss(own.hidden, own.head, own.target, **own.keywords(OPTIONS["all together"]))
        value.backward()
        return value.detach(), *map(gradient_of, (own.hidden, own.head, own.linear_bias))

    def formula(whole: CheckInputs) -> tuple[Tensor, ...]:
        loss, hidden_grad, head_grad, bias_grad = run(plain, whole)
        return loss, hidden_grad, head_grad[rows], bias_grad[rows]

    values = run(functools.partial(linear_cross_entropy, vocab=vocab, options=options), shard)
    yield from compare("sharded vocabulary", where, inputs, ("loss", "dX", "dW", "db"), values, formula)


def _with_own_tokens(rank: int, inputs: CheckInputs, where: str, options: ChunkOptions) -> Iterator[Row]:
    """Each rank has its rows of the head and its own tokens, as `LMHead.shard` makes of a model."""
    vocab = VocabShard.split(VOCAB, tokens="own")
    rows, mine = slice(vocab.start, vocab.stop), _own_slice(rank, inputs)
    own = inputs._replace(head=inputs.head[rows]).leaves()
    hidden = own.hidden[mine]
    loss = linear_cross_entropy(hidden, own.head, own.target[mine], reduction="sum", vocab=vocab, options=options)
    loss.backward()

    def formula(whole: CheckInputs) -> tuple[Tensor, ...]:
        """The gradient of the rows is summed over all tokens, and divided by the ranks as engines do."""
        leaves = whole.leaves()
        losses = plain(leaves.hidden, leaves.head, leaves.target, reduction="none")
        losses.sum().backward()
        return losses[mine].sum().detach(), gradient_of(leaves.hidden)[mine], gradient_of(leaves.head)[rows] / RANKS

    values = loss.detach(), gradient_of(own.hidden)[mine], gradient_of(own.head)
    # One number can be right by chance, as in `objective_checks`.
    rounding = {"loss": torch.finfo(inputs.hidden.dtype).eps}
    yield from compare(
        "sharded head, own tokens", where, inputs, ("loss", "dX", "dW"), values, formula, rounding=rounding
    )


def _parts_of_gradients(rank: int, inputs: CheckInputs, where: str) -> Iterator[Row]:
    """A gradient of the hidden states that ranks sum themselves, and one of this rank's share of the tokens alone."""
    share = len(inputs.target) // RANKS
    mine = slice(rank * share, (rank + 1) * share)
    even = inputs._replace(hidden=inputs.hidden[: RANKS * share], target=inputs.target[: RANKS * share])
    for kind in ("partial", "sequence"):
        vocab = VocabShard.split(VOCAB, input_grad=kind)
        own = even._replace(head=even.head[vocab.start : vocab.stop]).leaves()
        hidden = own.hidden if kind == "partial" else own.hidden[mine].detach().requires_grad_()
        linear_cross_entropy(hidden, own.head, own.target, reduction="sum", vocab=vocab).backward()
        gradient = gradient_of(hidden).float()
        if kind == "partial":
            dist.all_reduce(gradient)

        def formula(whole: CheckInputs, tokens: slice = mine if kind == "sequence" else slice(None)) -> tuple[Tensor]:
            leaves = whole.leaves()
            plain(leaves.hidden, leaves.head, leaves.target, reduction="sum").backward()
            return (gradient_of(leaves.hidden)[tokens],)

        yield from compare(f"sharded vocabulary, {kind} gradient", where, even, ("dX",), (gradient,), formula)


def _token_mean(rank: int, inputs: CheckInputs, where: str) -> Iterator[Row]:
    """Ranks hold different numbers of tokens, and gradients are averaged over ranks as engines do."""
    hidden, target = _own_tokens(rank, inputs)
    mean = TokenMean.over([target])
    head = inputs.leaves().head
    loss_sum = linear_cross_entropy(hidden, head, target, reduction="sum")
    mean(loss_sum).backward()
    gradient = gradient_of(head).float()
    dist.all_reduce(gradient)
    yield from _head_rows("token-weighted mean", where, inputs, mean.report([loss_sum.detach()]), gradient / RANKS)


def _own_tokens(rank: int, inputs: CheckInputs) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of a third of the tokens on rank 0, of the others on rank 1."""
    own = _own_slice(rank, inputs)
    return inputs.hidden[own], inputs.target[own]


def _own_slice(rank: int, inputs: CheckInputs) -> slice:
    cut = len(inputs.target) // 3
    return slice(0, cut) if rank == 0 else slice(cut, None)


def _head_rows(case: str, where: str, inputs: CheckInputs, loss: Tensor, gradient: Tensor) -> Iterator[Row]:
    def formula(whole: CheckInputs) -> tuple[Tensor, Tensor]:
        own = whole.leaves()
        value = plain(own.hidden, own.head, own.target)
        value.backward()
        return value.detach(), gradient_of(own.head)

    yield from compare(case, where, inputs, ("loss", "dW"), (loss, gradient), formula)


def _deepspeed(member: Member) -> Iterator[Row]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from chunked_ce.integrations.deepspeed import token_mean

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
    member.join()
    rank = member.rank
    inputs = CheckInputs.random(torch.float32, "cpu")
    hidden, target = _own_tokens(rank, inputs)
    for stage in (1, 3):
        head = torch.nn.Linear(inputs.head.shape[1], VOCAB, bias=False)
        head.weight.data.copy_(inputs.head)
        engine, *_ = deepspeed.initialize(
            model=_Loss(head),
            optimizer=torch.optim.SGD(head.parameters(), lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )
        mean = token_mean(engine, [target])
        loss_sum = engine(hidden, target)
        engine.backward(mean(loss_sum))
        gradient = safe_get_full_grad(head.weight)
        loss = mean.report([loss_sum.detach()])
        assert gradient is not None
        where = f"2 gloo processes, float32, ZeRO {stage}"
        yield from _head_rows("DeepSpeed's token-weighted mean", where, inputs, loss, gradient)


class _Loss(torch.nn.Module):
    """A head and the sum of its losses."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.head.weight, target, reduction="sum")


# ---- processes ----


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the processes that start within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run(function: Callable[[Member], Iterator[Row]], processes: int, timeout: float) -> list[Row]:
    """The rows of all processes. Raises ``RuntimeError`` if one fails or does not end in time."""
    rows: dict[int, list[Row]] = {}
    with Processes(_serve, processes, function) as group:
        for rank, (kind, content) in group.messages(timeout):
            if kind == "failed":
                raise RuntimeError(content)
            if kind == "rows" and rank is not None:
                rows[rank] = [Row(*row) for row in content]
    return [row for rank in sorted(rows) for row in rows[rank]]


def _serve(member: Member, pipe: Connection, function: Callable[[Member], Iterator[Row]]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(("rows", [tuple(row) for row in function(member)]))
    except Exception as error:
        pipe.send(failed(traceback.format_exception_only(error)[-1].strip().splitlines()[-1]))
        return
    pipe.send(("done", None))
    with contextlib.suppress(EOFError):
        pipe.recv()  # until all are done: ranks whose peers have ended fail
