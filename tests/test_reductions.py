"""`TokenMean` takes sums: means and results of its own, which are scaled for a backward, are refused where they are
known, and nothing else is."""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, TokenMean, cross_entropy, linear_cross_entropy, linear_loss, reductions
from chunked_ce.objectives import CrossEntropy

HIDDEN = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
HEAD = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([3, 1, -100, 7, 0, 2])
MEAN = TokenMean.over(TARGET)


def trained() -> tuple[torch.Tensor, torch.Tensor]:
    return HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()


def logits() -> torch.Tensor:
    return F.linear(*trained())


def auxiliary() -> torch.Tensor:
    """As that of a router: the mean of something else than the losses of tokens."""
    return logits().square().mean()


MEANS = {
    "ours": lambda: linear_cross_entropy(*trained(), TARGET),
    "ours, recomputed": lambda: linear_cross_entropy(*trained(), TARGET, options=ChunkOptions(gradients="backward")),
    "ours over a number": lambda: linear_cross_entropy(*trained(), TARGET, num_tokens=5),
    "ours of logits": lambda: cross_entropy(logits(), TARGET),
    "ours with statistics": lambda: linear_cross_entropy(*trained(), TARGET, return_stats=True)[0],
    "an objective's": lambda: linear_loss(CrossEntropy(z_loss=0.1), *trained(), TARGET),
    "ours without a graph": lambda: linear_cross_entropy(HIDDEN, HEAD, TARGET),
    "ours, detached": lambda: linear_cross_entropy(*trained(), TARGET).detach(),
    "torch's": lambda: F.cross_entropy(logits(), TARGET),
    "torch's module": lambda: torch.nn.CrossEntropyLoss()(logits(), TARGET),
    "torch's of images": lambda: F.cross_entropy(logits().T[None], TARGET[None]),
    "the mean of losses": lambda: F.cross_entropy(logits(), TARGET, reduction="none").mean(),
    "the mean of ours": lambda: linear_cross_entropy(*trained(), TARGET, reduction="none").mean(),
    "the mean over a dimension": lambda: F.cross_entropy(logits(), TARGET, reduction="none").mean(0),
    "a cast": lambda: F.cross_entropy(logits(), TARGET).double(),
    "a view of a copy": lambda: F.cross_entropy(logits(), TARGET).clone().reshape(1).squeeze(),
    "a cast of ours": lambda: linear_cross_entropy(*trained(), TARGET).double(),
}

SUMS = {
    "ours": lambda: linear_cross_entropy(*trained(), TARGET, reduction="sum"),
    "ours without a graph": lambda: linear_cross_entropy(HIDDEN, HEAD, TARGET, reduction="sum"),
    "statistics": lambda: linear_cross_entropy(*trained(), TARGET, return_stats=True)[1].loss_sum,
    "torch's": lambda: F.cross_entropy(logits(), TARGET, reduction="sum"),
    "the sum of losses": lambda: linear_cross_entropy(*trained(), TARGET, reduction="none").sum(),
    "with an auxiliary loss": lambda: F.cross_entropy(logits(), TARGET, reduction="sum") + 0.01 * auxiliary(),
    "a mean times its tokens": lambda: linear_cross_entropy(*trained(), TARGET) * 5,
    "a mean made a sum in place": lambda: linear_cross_entropy(*trained(), TARGET).mul_(5),
    "a detached mean made a sum": lambda: linear_cross_entropy(*trained(), TARGET).detach().mul_(5),
    "of one sequence's mean": lambda: linear_cross_entropy(*trained(), TARGET).sum(),
    "the mean of one sum": lambda: torch.stack([linear_cross_entropy(*trained(), TARGET, reduction="sum")]).mean(),
    "the mean over one device": lambda: linear_cross_entropy(*trained(), TARGET, reduction="sum").mean(),
    "a leaf": lambda: torch.tensor(3.0, requires_grad=True),
    "where it is finite": lambda: torch.where(torch.tensor(True), linear_cross_entropy(*trained(), TARGET) * 5, 0.0),
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_a_mean_is_refused(loss):
    for use in (MEAN, MEAN.for_backward, MEAN.report, lambda loss: MEAN.report([torch.tensor(1.0), loss])):
        with pytest.raises(
            ValueError, match=r'must be the sum of the losses of tokens, was their mean.*reduction="sum"'
        ):
            use(loss())


@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
def test_a_sum_is_taken(loss):
    assert MEAN(loss()) == MEAN.for_backward(loss()) == MEAN.report(loss())


@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize(
    "change",
    [lambda loss: loss, torch.Tensor.detach, lambda loss: loss.detach().reshape(1), lambda loss: [loss, loss.detach()]],
    ids=["itself", "detached", "a view", "a list"],
)
def test_a_result_is_no_value_to_log(loss, change):
    with pytest.raises(ValueError, match="was the result of for_backward, which is scaled for the engine"):
        MEAN.report(change(MEAN(loss())))


def test_a_result_is_not_scaled_again():
    with pytest.raises(ValueError, match="was the result of for_backward"):
        MEAN(TokenMean(3)(SUMS["ours"]()))


def test_in_bf16_and_without_a_graph():
    hidden, head = HIDDEN.bfloat16(), HEAD.bfloat16()
    with torch.no_grad():
        result = MEAN(linear_cross_entropy(hidden, head, TARGET, reduction="sum"))
        for value in (result, linear_cross_entropy(hidden, head, TARGET)):
            with pytest.raises(ValueError, match="loss_sums must be the sum"):
                MEAN.report(value)
    with torch.inference_mode():
        assert MEAN(linear_cross_entropy(hidden, head, TARGET)) > 0  # neither a graph nor a version to know it by


def test_accumulation():
    """The mean of a window, whose sums are logged as they are."""
    hidden, head = trained()
    mean, sums = TokenMean.over([TARGET, TARGET[:2]]), []
    for micro_batch in (TARGET, TARGET[:2]):
        loss_sum = linear_cross_entropy(hidden[: len(micro_batch)], head, micro_batch, reduction="sum")
        mean.for_backward(loss_sum).backward()
        sums.append(loss_sum.detach())
    both = linear_cross_entropy([HIDDEN, HIDDEN[:2]], HEAD, [TARGET, TARGET[:2]])
    torch.testing.assert_close(mean.report(sums), both)


def test_under_ddps_wrapper_of_outputs():
    """DDP puts a node of its own behind a module's outputs, which copies them."""
    from torch.nn.parallel.distributed import _DDPSink

    ddp = SimpleNamespace(_ddp_sink_clone=True)
    for mean in (MEANS["ours"](), MEANS["torch's"]()):
        other, copied = _DDPSink.apply(lambda: ddp, SUMS["ours"](), mean)
        assert MEAN(other) > 0
        with pytest.raises(ValueError, match="was their mean"):
            MEAN(copied)


def test_compiled_code_is_one_graph():
    """It leaves no marks and reads none, but for what an eager result shows."""

    def step(hidden, head, target):
        return MEAN(linear_cross_entropy(hidden, head, target, reduction="sum"))

    hidden, head = trained()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, head, TARGET)
    torch.testing.assert_close(compiled, step(hidden, head, TARGET))
    compiled.backward()
    assert hidden.grad is not None


def test_transforms():
    def step(hidden):
        return MEAN(linear_cross_entropy(hidden, HEAD, TARGET, reduction="sum"))

    hidden = trained()[0]
    step(hidden).backward()
    torch.testing.assert_close(torch.func.grad(step)(HIDDEN), hidden.grad)


def test_marks_end_with_their_tensors():
    """New tensors at the same address have no mark, and the marks do not pile up."""
    least = reductions._LEAST_FULL
    for _ in range(3 * least):
        MEAN(torch.tensor(2.0))
        assert reductions.reduction_of(torch.tensor(2.0)) is None
    assert len(reductions._marks) <= least
    kept = [MEAN(torch.tensor(2.0)) for _ in range(2 * least)]
    assert {reductions.reduction_of(one) for one in kept} == {"scaled"}
    del kept
    gc.collect()
    for _ in range(4 * least):
        MEAN(torch.tensor(2.0))
    assert len(reductions._marks) <= least


def test_a_loop_that_keeps_its_losses_looks_at_each_few_times(monkeypatch):
    looks = 0

    class Counted(reductions.StorageWeakRef):
        def expired(self):
            nonlocal looks
            looks += 1
            return super().expired()

    monkeypatch.setattr(reductions, "StorageWeakRef", Counted)
    monkeypatch.setattr(reductions, "_marks", reductions._Marks())
    kept = [reductions.marked(torch.tensor(2.0), "mean") for _ in range(8 * reductions._LEAST_FULL)]
    assert len(reductions._marks) == len(kept) and looks <= len(kept)
