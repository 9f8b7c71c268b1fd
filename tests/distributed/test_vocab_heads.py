"""Adapters and depths on a sharded vocabulary, uneven and with an empty shard, in threads of one process."""

import collections
import contextlib
import itertools
import re
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from chunked_ce import VocabShard, linear_cross_entropy, linear_logprobs, linear_statistics
from chunked_ce.engine import in_step
from chunked_ce.parallel.collectives import Collectives
from tests.cases import chunks
from tests.distributed.threads import run_threads
from tests.distributed.vocab_failures import out_of_memory

RANKS, VOCAB, WIDTH, RANK_R, CHUNK = 3, 19, 5, 2, 6
BOUNDS = ((0, 0), (0, 12), (12, 19))
SIZES = (12, 3, 0, 9)  # tokens of the depths; of one depth, those of the first


class Case(NamedTuple):
    function: str  # and way
    input_grad: str = "complete"
    depths: int = 1
    adapter: bool = True
    frozen: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    padding: int = 0

    def __str__(self):
        return "-".join(map(str, self))


WAYS = ("forward", "backward", "logprobs")
FROZEN = (("hidden",), ("adapter_hidden",), ("hidden", "adapter_hidden"), ("weight",), ("weight", "adapter_weight"))
CASES = [
    *(Case(way, at) for way in WAYS for at in ("complete", "partial", "sequence")),
    *(
        Case(way, at, frozen=names)
        for way in ("forward", "backward")
        for at in ("complete", "sequence")
        for names in FROZEN
    ),
    *(Case(way, at, 4, adapter) for way in WAYS for at in ("complete", "partial") for adapter in (False, True)),
    *(Case(way, "complete", 4, True, names) for way in WAYS[:2] for names in FROZEN),
    *(Case(way, at, dtype=torch.float16) for way in WAYS[:2] for at in ("complete", "sequence")),
    *(Case(way, "complete", 4, True, (), dtype) for way in WAYS for dtype in (torch.float16, torch.bfloat16)),
    *(Case(way, "complete", depths, padding=3) for way in WAYS[:2] for depths in (1, 4)),
]


def tensors_of(case: Case, rank: int | None) -> dict[str, list[torch.Tensor]]:
    """The leaves of a rank, or of a single process for None, by name."""
    g = torch.Generator().manual_seed(7)
    sizes = SIZES[: case.depths]

    def normal(*shape):
        return (0.5 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(case.dtype)

    whole = {"hidden": [normal(n, WIDTH) for n in sizes], "weight": [normal(VOCAB, WIDTH)], "bias": [normal(VOCAB)]}
    if case.adapter:
        whole |= {"adapter_hidden": [normal(n, RANK_R) for n in sizes], "adapter_weight": [normal(VOCAB, RANK_R)]}

    def mine(name, part):
        if rank is not None and "hidden" not in name:
            part = part[slice(*BOUNDS[rank])]
            missing = part.new_full((max_rows() + case.padding - len(part), *part.shape[1:]), torch.nan)
            part = torch.cat([part, missing]) if case.padding else part
        elif rank is not None and case.input_grad == "sequence":
            part = part.chunk(RANKS)[rank]
        return part.detach().clone().requires_grad_(name not in case.frozen)

    return {name: [mine(name, part) for part in parts] for name, parts in whole.items()}


def max_rows() -> int:
    return max(stop - start for start, stop in BOUNDS)


def targets_of(case: Case) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(8)
    targets = [torch.randint(VOCAB, (n,), generator=g) for n in SIZES[: case.depths]]
    return [target.where(torch.rand(target.shape, generator=g) > 0.25, -100) for target in targets]


def run(case: Case, rank: int | None) -> dict[str, list[torch.Tensor]]:
    """The value and the gradients, by name."""
    tensors, targets = tensors_of(case, rank), targets_of(case)
    vocab = None
    if rank is not None:
        start, stop = BOUNDS[rank]
        padded = max_rows() + case.padding if case.padding else None
        vocab = VocabShard(dist.group.WORLD, start, stop, VOCAB, input_grad=case.input_grad, padded_rows=padded)
    hidden, target = (x if case.depths > 1 else x[0] for x in (tensors["hidden"], targets))
    keywords = {"linear_bias": tensors["bias"][0], "vocab": vocab}
    if case.adapter:
        of_tokens = tensors["adapter_hidden"] if case.depths > 1 else tensors["adapter_hidden"][0]
        keywords["linear_adapter"] = of_tokens, tensors["adapter_weight"][0]
    if case.function == "logprobs":
        logprobs = linear_logprobs(hidden, tensors["weight"][0], target, options=chunks(CHUNK), **keywords)
        parts = logprobs if case.depths > 1 else [logprobs]
        value = sum((part * torch.arange(1, 1 + len(part))).sum() for part in parts)
    else:
        options = chunks(CHUNK, case.function)
        value = linear_cross_entropy(hidden, tensors["weight"][0], target, options=options, **keywords)
    trained = [(name, leaf) for name, leaves in tensors.items() for leaf in leaves if leaf.requires_grad]
    found = collections.defaultdict(list, value=[value.detach()])
    for (name, leaf), gradient in zip(trained, torch.autograd.grad(value, [leaf for _, leaf in trained]), strict=True):
        assert gradient.dtype == leaf.dtype
        if rank is not None and "hidden" in name and case.input_grad == "partial":
            dist.all_reduce(gradient)
        if rank is not None and "hidden" not in name:
            assert not gradient[BOUNDS[rank][1] - BOUNDS[rank][0] :].any(), "rows of padding got a gradient"
        found[name].append(gradient)
    return dict(found)


def whole_of(case: Case, name: str, of_ranks: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The results of all ranks, put together."""
    if name == "value" or ("hidden" in name and case.input_grad != "sequence"):
        for other in of_ranks[1:]:
            torch.testing.assert_close(other, of_ranks[0], rtol=0, atol=0)
        return of_ranks[0]
    rows = [None if "hidden" in name else stop - start for start, stop in BOUNDS]
    return [torch.cat([parts[0][:size] for parts, size in zip(of_ranks, rows, strict=True)])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_on_one_rank(case):
    expected = run(case, None)
    found = run_threads(lambda rank, _: run(case, rank), RANKS)
    assert all(of_rank.keys() == expected.keys() for of_rank in found)
    tolerance = {torch.float64: 1e-13, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    for name, values in expected.items():
        for value, other in zip(values, whole_of(case, name, [of_rank[name] for of_rank in found]), strict=True):
            size = max(1e-30, value.abs().max().item()) if value.numel() else 1.0
            torch.testing.assert_close(other, value, rtol=0, atol=tolerance * size)


def test_steps_are_the_collectives_of_a_call(monkeypatch):
    """Those that a rank goes through once it has failed are those that the others issue, in their order."""
    found, expected = (collections.defaultdict(list) for _ in range(2))
    start, together = Collectives._start, in_step._together

    def recording(self, what, collective, *tensors, result):
        part = tensors[-1]
        found[dist.get_rank()].append((what, tuple(part.shape), part.dtype))
        return start(self, what, collective, *tensors, result=result)

    def listing(steps, *arguments, **keywords):
        expected[dist.get_rank()] += [(step.what, tuple(step.shape), step.dtype) for step in steps()]
        return together(steps, *arguments, **keywords)

    monkeypatch.setattr(Collectives, "_start", recording)
    monkeypatch.setattr(in_step, "_together", listing)
    run_threads(lambda rank, _: [run(case, rank) for case in CASES] and None, RANKS)
    for rank in range(RANKS):
        assert len(found[rank]) > 4 * len(CASES)
        assert found[rank] == expected[rank]


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("depths", [1, 4])
@pytest.mark.parametrize("place", ["gradients", "head", "hidden"])
def test_a_rank_that_fails(place, depths, way):
    """All ranks fail, and their next call works."""
    if (place in ("head", "hidden")) and (depths, way) == (1, "backward"):
        pytest.skip("its products are written block by block")
    case = Case(way, depths=depths)

    def worker(rank, _):
        expected, message = run(case, rank), ""
        dist.barrier()
        with out_of_memory(place, 1) if rank == 0 else contextlib.nullcontext():
            dist.barrier()
            try:
                run(case, rank)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                message = str(error)
            dist.barrier()
        for name, values in run(case, rank).items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=0)
        return message

    # The patch is of all threads: whichever comes second fails.
    messages = run_threads(worker, RANKS)
    assert all("a simulated one" in message for message in messages)


def test_a_support():
    """Log-probabilities over a support gather rows of both weights, on every rank."""
    case = Case("logprobs")
    support = torch.arange(VOCAB).expand(SIZES[0], VOCAB)

    def statistics(rank):
        tensors, (target,) = tensors_of(case, rank), targets_of(case)
        vocab = None if rank is None else VocabShard(dist.group.WORLD, *BOUNDS[rank], VOCAB)
        (hidden,), (weight,), (bias,), *adapter = tensors.values()
        keywords = {"linear_bias": bias, "linear_adapter": [part for (part,) in adapter], "vocab": vocab}
        value = linear_statistics(hidden, weight, target, support=support, **keywords).logprob
        leaves = list(itertools.chain(*tensors.values()))
        return dict(zip(tensors, torch.autograd.grad((value * torch.arange(12)).sum(), leaves), strict=True))

    expected = statistics(None)
    found = run_threads(lambda rank, _: statistics(rank), RANKS)
    for name, value in expected.items():
        other = whole_of(case, name, [[of_rank[name]] for of_rank in found])[0]
        torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-12)


WRONG = {
    "rank": "rank r",
    "frozen": r"linear_adapter\[0\].requires_grad",
    "values": r"linear_adapter\[0\]'s values",
    "missing": "linear_adapter",
    "depths": "depths",
    "depth": r"input's values .* \(depth 1\)",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_ranks_that_disagree(wrong):
    def worker(rank, _):
        g = torch.Generator().manual_seed(0)
        odd = rank == 1
        width = 3 if odd and wrong == "rank" else 2
        hidden, target = torch.randn(4, WIDTH, generator=g), torch.zeros(4, dtype=torch.int64)
        start, stop = BOUNDS[rank]
        adapter = torch.ones(4, width), torch.ones(stop - start, width)
        if odd and wrong == "frozen":
            adapter[0].requires_grad_()
        if odd and wrong == "values":
            adapter[0].mul_(2)
        vocab = VocabShard(dist.group.WORLD, start, stop, VOCAB)
        keywords = {"linear_adapter": adapter}
        if (odd and wrong == "missing") or "depth" in wrong:
            keywords = {}
        if "depth" in wrong:
            number = 3 if odd and wrong == "depths" else 2
            hidden, target = [hidden, *[hidden.clone() for _ in range(number - 1)]], [target] * number
            if odd and wrong == "depth":
                hidden[1].mul_(2)
        try:
            linear_cross_entropy(hidden, torch.ones(stop - start, WIDTH), target, vocab=vocab, **keywords)
        except ValueError as error:
            return str(error)

    for message in run_threads(worker, RANKS):
        assert message is not None
        assert re.search(f"disagree on .*{WRONG[wrong]}", message), message


def test_depths_of_sequence_shards_are_refused():
    def worker(rank, _):
        vocab = VocabShard(dist.group.WORLD, *BOUNDS[rank], VOCAB, input_grad="sequence")
        rows = BOUNDS[rank][1] - BOUNDS[rank][0]
        hidden, target = [torch.ones(1, WIDTH)] * 2, [torch.zeros(RANKS, dtype=torch.int64)] * 2
        with pytest.raises(ValueError, match=r"input must be one tensor, was a list of 2: vocab\.input_grad="):
            linear_cross_entropy(hidden, torch.ones(rows, WIDTH), target, vocab=vocab)

    run_threads(worker, RANKS)


@pytest.mark.parametrize("depths", [1, 2])
def test_dtensors(depths):
    """Both weights are sharded on dim 0; hidden states are local, or DTensors in lists too."""

    def run_on(mesh):
        case = Case("forward", depths=depths)
        tensors, targets = tensors_of(case, None), targets_of(case)
        if mesh is not None:
            shards = {"weight": Shard(0), "bias": Shard(0), "adapter_weight": Shard(0), "adapter_hidden": Replicate()}
            for name, placement in shards.items():
                tensors[name] = [
                    distribute_tensor(part.detach(), mesh, [placement], src_data_rank=None).requires_grad_()
                    for part in tensors[name]
                ]
        hidden, of_adapter, target = (
            parts if depths > 1 else parts[0] for parts in (tensors["hidden"], tensors["adapter_hidden"], targets)
        )
        adapter = of_adapter, tensors["adapter_weight"][0]
        keywords = {"linear_bias": tensors["bias"][0], "linear_adapter": adapter, "options": chunks(CHUNK)}
        value = linear_cross_entropy(hidden, tensors["weight"][0], target, **keywords)
        leaves = list(itertools.chain(*tensors.values()))
        found = torch.autograd.grad(value, leaves)
        assert all(isinstance(x, DTensor) == isinstance(leaf, DTensor) for x, leaf in zip(found, leaves, strict=True))
        return [value.detach(), *(x.full_tensor() if isinstance(x, DTensor) else x for x in found)]

    expected = run_on(None)
    for found in run_threads(lambda rank, ranks: run_on(init_device_mesh("cpu", (ranks,))), RANKS):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
