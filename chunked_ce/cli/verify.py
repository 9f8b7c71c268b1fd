"""``chunked-ce plan --verify``: one real step of the loss and of a small model, beside what the plan predicts for them.

Each is measured in a process of its own, on one rank: the shape is halved until a step takes seconds here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from chunked_ce.cli import memory
from chunked_ce.cli.console import simple_table
from chunked_ce.cli.model_shapes import ModelShape
from chunked_ce.cli.planning.estimate import estimate
from chunked_ce.cli.planning.loss import paths_of
from chunked_ce.cli.planning.run import DTYPES, Path, Run
from chunked_ce.cli.small_model import SmallModel
from chunked_ce.cli.training_losses import LossTensors, loss_on
from chunked_ce.cli.units import MIB

__all__ = ["ALLOWED", "Case", "Outcome", "cases_of", "loss_run", "measure", "measured", "step_run", "summary", "table"]

ALLOWED = {"loss": 0.1, "step": 0.2}  # of the prediction
_MEASURED_PATHS = ("full", "forward", "backward")  # what a filter keeps is that of a trained model
_OPTIMIZERS = ("adamw", "sgd", "none")
_OPERATIONS = {"cpu": 2**37, "cuda": 2**47}  # in a step: a few seconds on two cores, or on a card
_SHARE = 0.4  # of the free memory, which a step may take
_LEAST = {"tokens": 512, "vocab": 8192, "hidden": 256}
_LAYERS = 2
_LIBRARIES = 8 * MIB  # that a matrix library takes on some machines, and that the law leaves out or puts in
_MMAP_THRESHOLD = -3  # mallopt's name of the size from which a block is mapped on its own


class Case(NamedTuple):
    """What to measure, on which path of the loss."""

    kind: str  # "loss" or "step"
    run: Run
    path: Path


class Outcome(NamedTuple):
    """A prediction and a measurement, in bytes."""

    case: Case
    predicted: int
    measured: int

    @property
    def difference(self) -> float:
        """Measured above predicted, as a share of the prediction."""
        return self.measured / self.predicted - 1

    @property
    def holds(self) -> bool:
        allowed = max(_LIBRARIES, ALLOWED[self.case.kind] * self.predicted)
        return abs(self.measured - self.predicted) <= allowed

    def document(self) -> dict[str, object]:
        """The outcome for a JSON file; sizes in bytes."""
        kind, run, path = self.case
        return {
            "kind": kind,
            "path": path,
            "trainer": run.trainer,
            "tokens": run.local_tokens,
            "hidden": run.model.hidden,
            "vocab": run.model.vocab,
            "layers": run.model.layers,
            "dtype": run.dtype,
            "precision": run.precision,
            "optimizer": run.optimizer,
            "checkpointing": run.checkpointing,
            "lora": run.lora,
            "train_head": run.trains_head,
            "accumulation": run.accumulation,
            "predicted_bytes": self.predicted,
            "measured_bytes": self.measured,
            "difference": round(self.difference, 4),
            "allowed": ALLOWED[kind],
            "holds": self.holds,
        }


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line: whether the predictions hold."""
    wrong = sum(not outcome.holds for outcome in outcomes)
    text = f"{len(outcomes) - wrong} of {len(outcomes)} predictions hold"
    shares = f"{ALLOWED['loss']:.0%} for a loss, {ALLOWED['step']:.0%} for a step of a small model"
    return f"{text}: within {shares}, or {_LIBRARIES // MIB} MiB."


def table(outcomes: Sequence[Outcome]) -> Table:
    """Predictions beside measurements, in MiB."""
    columns = ("", "path", "N", "D", "V", "layers", "predicted MiB", "measured MiB", "difference", "")
    drawn = simple_table("on this machine, scaled down to seconds", columns, left=("", "path"))
    for outcome in outcomes:
        kind, run, path = outcome.case
        sizes = (run.local_tokens, run.model.hidden, run.model.vocab, run.model.layers)
        drawn.add_row(
            f"{run.trainer} {kind}",
            path,
            *(f"{size:,}" for size in sizes),
            *(f"{size / MIB:,.0f}" for size in (outcome.predicted, outcome.measured)),
            f"{outcome.difference:+.1%}",
            "" if outcome.holds else "does not hold",
        )
    return drawn


def cases_of(run: Run, path: Path) -> list[Case]:
    """The loss on each path that can be measured, and a step on ``path``. ``ValueError`` for what cannot be."""
    why = memory.why_not_measured(run.device)
    if why is not None:
        raise ValueError(f"--verify cannot measure here: {why}")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--verify measures on this machine, which has no CUDA device: add --device cpu")
    if run.optimizer not in _OPTIMIZERS:
        raise ValueError(f"--verify measures --optimizer {', '.join(_OPTIMIZERS)}, was {run.optimizer}")
    if run.ids or run.adapter:
        raise ValueError("--verify measures the losses of the trainers, without --ids and --adapter")
    if run.model.experts or run.model.latent:
        raise ValueError(f"--verify measures dense models, and {run.model.name} has experts or latent attention")
    free = memory.available(run.device)
    loss = loss_run(run, free)
    cases = [Case("loss", loss, one) for one in paths_of(loss) if one in _MEASURED_PATHS]
    if run.model.layers and run.train_input:
        usual: Path = "forward" if "forward" in paths_of(run) else "backward"
        cases.append(Case("step", step_run(run, free), path if path in _MEASURED_PATHS else usual))
    return cases


def loss_run(run: Run, free: int) -> Run:
    """The loss of ``run`` alone, of a size that this machine computes in seconds."""
    shape = dataclasses.replace(run.model, layers=0, heads=0)
    other = dataclasses.replace(run.other_model, layers=0, heads=0) if run.other_model else None
    # All else has no effect on the loss.
    alone = dataclasses.replace(
        _on_one_rank(run), lora=0, train_head=run.trains_head, checkpointing="none", optimizer="none", accumulation=1
    )
    return _small(dataclasses.replace(alone, model=shape, other_model=other), free)


def step_run(run: Run, free: int) -> Run:
    """A training step of ``run`` with few layers, of a size that this machine computes in seconds."""

    def few(shape: ModelShape) -> ModelShape:
        return dataclasses.replace(shape, layers=min(_LAYERS, shape.layers), positions=0, biases=False, source="small")

    alone = dataclasses.replace(_on_one_rank(run), model=few(run.model))
    other = few(run.other_model) if run.other_model else None
    return _small(dataclasses.replace(alone, other_model=other), free)


def _on_one_rank(run: Run) -> Run:
    """The tokens of one rank, and the dtype that a CPU computes fast in."""
    tokens = max(1, run.tokens // run.sequence)
    batch = run.batch if tokens % run.batch == 0 else 1
    dtype = "fp32" if run.device == "cpu" else run.dtype
    ranks = {"data": 1, "tensor": 1, "pipeline": 1, "sequence": 1}
    return dataclasses.replace(run, tokens=tokens, batch=batch, engine="none", dtype=dtype, other=0, **ranks)  # type: ignore[arg-type]


def _small(run: Run, free: int) -> Run:
    """Halve tokens, vocabulary and widths in turn until a step is small enough."""
    while _is_large(run, free):
        smaller = _halved(run)
        if smaller == run:
            return run
        run = smaller
    return run


def _is_large(run: Run, free: int) -> bool:
    per_token = 8 * run.model.parameters if run.model.layers else 4 * run.model.head_parameters
    return run.local_tokens * per_token > _OPERATIONS[run.device] or estimate(run, "full").total > _SHARE * free


def _halved(run: Run) -> Run:
    """The size that is the most above its least is halved."""
    sizes = {"tokens": run.tokens, "vocab": run.model.vocab, "hidden": run.model.hidden}
    name = max(sizes, key=lambda one: sizes[one] / _LEAST[one])
    if sizes[name] < 2 * _LEAST[name]:
        return run
    if name == "tokens":
        return dataclasses.replace(run, tokens=run.tokens // 2, batch=1)
    other = _halved_shape(run.other_model, name) if run.other_model else None
    teacher = run.teacher_hidden // 2 if run.teacher_hidden and name == "hidden" else run.teacher_hidden
    return dataclasses.replace(run, model=_halved_shape(run.model, name), other_model=other, teacher_hidden=teacher)


def _halved_shape(shape: ModelShape, name: str) -> ModelShape:
    if name == "vocab":
        return dataclasses.replace(shape, vocab=shape.vocab // 2)
    heads, kv_heads = max(1, shape.heads // 2), max(1, shape.kv_heads // 2)
    if heads % kv_heads:
        kv_heads = 1
    sizes = {"hidden": shape.hidden // 2, "intermediate": shape.intermediate // 2}
    if shape.layers:
        sizes |= {"heads": heads, "kv_heads": kv_heads}
    return dataclasses.replace(shape, **sizes)  # type: ignore[arg-type]


def measured(cases: Sequence[Case]) -> Iterator[Outcome]:
    """The outcome of one case after another, each in a process of its own."""
    context = _context()
    for case in cases:
        found = estimate(case.run, case.path)
        predicted = found.total if case.kind == "step" else found.loss
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            yield Outcome(case, predicted, pool.submit(measure, case).result())


def _context() -> BaseContext:
    """Processes that start from one that has imported all this, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def measure(case: Case) -> int:
    """Bytes at the peak of a case in this process, which has to be a new one."""
    torch.manual_seed(0)
    _return_freed_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    make = _loss_step if case.kind == "loss" else _training_step
    tiny = dataclasses.replace(case.run, tokens=64, batch=1)
    warm_up, _ = make(tiny, case.path)  # what libraries keep from their first call on
    warm_up()
    work, held = make(case.run, case.path)
    if case.kind == "step":
        work()  # the optimizer's state
    return memory.peak_of(work, case.run.device) + held()


def _return_freed_memory() -> None:
    """Let the C allocator give freed blocks back at once: those that it holds would count as taken."""
    with contextlib.suppress(AttributeError, OSError):  # not with the GNU C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**17)


def _loss_step(run: Run, path: Path) -> tuple[Callable[[], None], Callable[[], int]]:
    """One call of the loss and its backward, beside inputs that do not count."""
    dtype, device, n, d = DTYPES[run.dtype], run.device, run.local_tokens, run.model.hidden
    hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_(run.train_input)
    head_dtype = torch.float32 if run.precision == "autocast" and run.trains_head else dtype
    weight = (torch.randn(run.model.vocab, d, device=device) / d**0.5).to(head_dtype).requires_grad_(run.trains_head)
    tensors = LossTensors.random(run)

    def work() -> None:
        with _autocast(run):
            loss = loss_on(run, path, hidden, weight, tensors)
        loss.backward()
        hidden.grad = weight.grad = None

    return work, lambda: 0


def _training_step(run: Run, path: Path) -> tuple[Callable[[], None], Callable[[], int]]:
    """One step of a small model, and the bytes of the tensors that it holds between steps."""
    wide = run.precision == "autocast"
    dtype = torch.float32 if wide else DTYPES[run.dtype]
    model = _model(run.model, run, dtype)
    frozen = _model(run.frozen_model, run, DTYPES[run.dtype]).requires_grad_(False) if run.frozen_model else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not run.train_head and not run.lora:
        model.head.requires_grad_(False)
    update = _optimizer(run, trained)
    tensors = LossTensors.random(run)
    length = max(1, run.tokens // run.batch)
    tokens = torch.randint(run.model.vocab, (run.local_tokens // length, length), device=run.device)

    def work() -> None:
        for _ in range(min(2, run.accumulation)):
            with _autocast(run):
                given = tensors.with_frozen(run, frozen, model, tokens)
                hidden = model(tokens).flatten(0, 1)
                loss = loss_on(run, path, hidden, model.head, given)
            del hidden, given
            loss.backward()
        update()
        for parameter in trained:
            parameter.grad = None

    def held() -> int:
        kept = [*model.parameters(), *(frozen.parameters() if frozen is not None else []), *update.state()]
        return sum(tensor.nbytes for tensor in kept)

    return work, held


def _model(shape: ModelShape, run: Run, dtype: torch.dtype) -> SmallModel:
    model = SmallModel(shape, lora=run.lora if shape is run.model else 0, checkpointing=run.checkpointing)
    return model.to(run.device, dtype)


def _autocast(run: Run) -> torch.autocast:
    narrow = run.precision == "autocast" and run.itemsize < 4
    return torch.autocast(run.device, DTYPES[run.dtype] if narrow else torch.bfloat16, enabled=narrow)


class _Update:
    """The optimizer's step: of narrow weights with fp32 masters one after another, so that one gradient is cast at a
    time."""

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, masters: bool) -> None:
        self.parameters = list(parameters)
        self.masters = [parameter.detach().float() if masters else None for parameter in parameters]
        of = [one if master is None else master for one, master in zip(self.parameters, self.masters, strict=True)]
        if kind == "adamw":
            self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW([one], fused=True) for one in of]
        else:
            self.optimizers = [torch.optim.SGD([one], lr=1e-3) for one in of] if kind == "sgd" else []

    def __call__(self) -> None:
        for optimizer, one, master in zip(self.optimizers, self.parameters, self.masters, strict=bool(self.optimizers)):
            if master is not None and one.grad is not None:
                master.grad = one.grad.float()
            optimizer.step()
            if master is not None:
                one.data.copy_(master)
                master.grad = None

    def state(self) -> list[Tensor]:
        """Master weights and moments."""
        moments = [value for one in self.optimizers for entry in one.state.values() for value in entry.values()]
        return [one for one in (*moments, *self.masters) if isinstance(one, Tensor)]


def _optimizer(run: Run, trained: Sequence[nn.Parameter]) -> _Update:
    masters = run.precision == "mixed" and run.itemsize < 4 and run.optimizer != "none"
    return _Update(trained, run.optimizer, masters)
