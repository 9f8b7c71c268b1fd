"""What ``chunked-ce check`` runs in other processes: two ranks over gloo, DeepSpeed on them, Triton's interpreter."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from chunked_ce import ChunkOptions, TokenMean, VocabShard, linear_cross_entropy
from chunked_ce.cli.checking import CHUNK, OPTIONS, VOCAB, Inputs, Row, compare, plain, small_cases

__all__ = ["deepspeed_rows", "interpreted_rows", "sharded_rows"]

RANKS = 2


def interpreted_rows(timeout: float) -> list[Row]:
    """The Triton kernels in its interpreter, on a CPU."""
    with _environment(TRITON_INTERPRET="1"):
        return _run(_interpreted, 1, timeout)


def sharded_rows(timeout: float) -> list[Row]:
    """The vocabulary sharded over two processes, and the token-weighted mean over them."""
    return _run(_sharded, RANKS, timeout)


def deepspeed_rows(timeout: float) -> list[Row]:
    """The token-weighted mean under DeepSpeed on two processes."""
    with _environment(DS_ACCELERATOR="cpu"):
        return _run(_deepspeed, RANKS, timeout)


def _interpreted(rank: int) -> Iterator[Row]:
    for dtype in (torch.float32, torch.float16):  # to bf16 the interpreter truncates, where devices round
        yield from small_cases("cpu", dtype, "triton")


def _sharded(rank: int) -> Iterator[Row]:
    _join(rank)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs.random(dtype, "cpu")
        at = f"2 gloo processes, {str(dtype).removeprefix('torch.')}"
        for way in ("forward", "backward"):
            yield from _vocab_parallel(inputs, f"{at}, {way}", ChunkOptions(chunk_size=CHUNK, gradients=way))
        yield from _token_mean(rank, inputs, at)


def _vocab_parallel(inputs: Inputs, where: str, options: ChunkOptions) -> Iterator[Row]:
    shard = VocabShard.split(VOCAB)
    words = slice(shard.start, shard.stop)
    wanted = {name: value for name, value in OPTIONS["all together"].items() if value is not True}
    hidden, head, bias = inputs.leaves()
    part, part_bias = (t.detach()[words].clone().requires_grad_() for t in (head, bias))
    loss = linear_cross_entropy(
        hidden,
        part,
        inputs.target,
        linear_bias=part_bias,
        weight=inputs.class_weight,
        token_weight=inputs.token_weight,
        vocab=shard,
        options=options,
        **wanted,
    )
    loss.backward()

    def whole(own: Inputs) -> tuple[torch.Tensor, ...]:
        x, w, b = own.leaves()
        value = plain(x, w, own.target, bias=b, class_weight=own.class_weight, token_weight=own.token_weight, **wanted)
        value.backward()
        return value.detach(), x.grad, w.grad[words], b.grad[words]

    found = loss.detach(), hidden.grad, part.grad, part_bias.grad
    results = found, whole(inputs), whole(inputs.double())
    dtype = inputs.hidden.dtype
    yield from compare("sharded vocabulary", where, dtype, ("loss", "dX", "dW", "db"), *results)


def _token_mean(rank: int, inputs: Inputs, where: str) -> Iterator[Row]:
    """Unevenly many tokens on the ranks, gradients averaged over them as engines do."""
    cut = len(inputs.target) // 3
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    mean = TokenMean.over([inputs.target[mine]])
    hidden, head, _ = inputs.leaves()
    own = linear_cross_entropy(hidden[mine], head, inputs.target[mine], reduction="sum")
    mean(own).backward()
    gradient = head.grad.float()
    dist.all_reduce(gradient)
    yield from _head_rows("token-weighted mean", where, inputs, mean.report([own.detach()]), gradient / RANKS)


def _head_rows(case: str, where: str, inputs: Inputs, loss: torch.Tensor, gradient: torch.Tensor) -> Iterator[Row]:
    def whole(own: Inputs) -> tuple[torch.Tensor, ...]:
        x, w, _ = own.leaves()
        value = plain(x, w, own.target)
        value.backward()
        return value.detach(), w.grad

    results = (loss, gradient), whole(inputs), whole(inputs.double())
    yield from compare(case, where, inputs.hidden.dtype, ("loss", "dW"), *results)


def _deepspeed(rank: int) -> Iterator[Row]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from chunked_ce.integrations.deepspeed import token_mean

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
    _join(rank)
    inputs = Inputs.random(torch.float32, "cpu")
    cut = len(inputs.target) // 3
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
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
        mean = token_mean(engine, [inputs.target[mine]])
        own = engine(inputs.hidden[mine], inputs.target[mine])
        engine.backward(mean(own))
        gradient = safe_get_full_grad(head.weight)
        yield from _head_rows(
            "DeepSpeed's token-weighted mean",
            f"2 gloo processes, float32, ZeRO {stage}",
            inputs,
            mean.report([own.detach()]),
            gradient,
        )


class _Loss(torch.nn.Module):
    """A head and the sum of its losses."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, self.head.weight, target, reduction="sum")


# ---- processes ----


def _join(rank: int) -> None:
    folder = os.environ["CHUNKED_CE_CHECK_FOLDER"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables for processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run(function: Callable[[int], Iterator[Row]], processes: int, timeout: float) -> list[Row]:
    """The rows of all processes. Raises ``RuntimeError`` if one fails or does not end in time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="chunked-ce-") as folder, _environment(CHUNKED_CE_CHECK_FOLDER=folder):
        started = [context.Process(target=_main, args=(function, rank, folder)) for rank in range(processes)]
        for process in started:
            process.start()
        deadline = time.monotonic() + timeout
        failed = False
        while any(process.is_alive() for process in started) and time.monotonic() < deadline and not failed:
            failed = any(process.exitcode not in (None, 0) for process in started)
            time.sleep(0.02)
        for process in started:
            process.kill()
            process.join()
        found = [Path(folder, f"{rank}.pt") for rank in range(processes)]
        if not all(path.exists() for path in found):
            raise RuntimeError(_what_happened(folder, timeout, late=time.monotonic() >= deadline))
        return [Row(*row) for path in found for row in torch.load(path, weights_only=True)]


def _what_happened(folder: str, timeout: float, *, late: bool) -> str:
    errors = [path.read_text().strip().splitlines()[-1] for path in Path(folder).glob("*.error")]
    return errors[0] if errors else f"not done after {timeout:g} s" if late else "a process ended"


def _main(function: Callable[[int], Iterator[Row]], rank: int, folder: str) -> None:
    log = os.open(os.path.join(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        rows = [tuple(row) for row in function(rank)]
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without a farewell that would wait for the other
    partial = Path(folder, f"{rank}.partial")
    torch.save(rows, partial)
    partial.rename(Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()
