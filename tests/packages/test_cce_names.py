"""`chunked_ce.integrations.cce` against CCE's own torch implementation, full logits, and float64."""

import functools
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from chunked_ce.integrations import cce
from tests.cases import array
from tests.distributed.threads import run_threads
from tests.packages.comparison import VOCAB, assert_same, model, responses, result
from tests.precision import assert_no_worse

BATCH, TIME = 4, 10
TARGETS = responses(BATCH, TIME)
MODEL = model(BATCH, TIME)
SMALL = dict.fromkeys(("accum_e_fp32", "accum_c_fp32"), True)


def plain(hidden, weight, bias, shift=0, softcap=None, reduction="mean"):
    """The loss and the log-sum-exps on full logits."""
    hidden, targets = hidden[:, : TIME - shift], TARGETS[:, shift:]
    z = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction=reduction)
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return loss, z.logsumexp(-1).where(targets != -100, 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"filter_eps": None}, {"impl": "cce_exact"}, SMALL], ids=str)
def test_loss(options, shift, softcap, reduction):
    keywords = {"shift": shift, "softcap": softcap, "reduction": reduction}
    loss = cce.LinearCrossEntropy(**keywords, **options)
    ours = lambda hidden, weight, bias: loss(hidden, weight, TARGETS, bias)  # noqa: E731
    assert_same(ours, lambda *leaves: plain(*leaves, **keywords)[0], MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True])
def test_against_cce(shift, reduction, dtype):
    """No worse than its own torch implementation, against float64."""
    package = pytest.importorskip("cut_cross_entropy")
    options = {"softcap": 3.0, "reduction": reduction, "shift": shift}

    def ours(hidden, weight):
        return cce.linear_cross_entropy(hidden, weight, TARGETS, **options)

    def theirs(hidden, weight):
        return package.linear_cross_entropy(hidden, weight, TARGETS, impl="torch_compile", **options)

    exact = result(lambda *x: plain(*x, None, int(shift), 3.0, reduction)[0], MODEL[:2], torch.float64)
    found = result(ours, MODEL[:2], dtype), result(theirs, MODEL[:2], dtype)
    for what, (mine, other, right) in enumerate(zip(*found, exact, strict=True)):
        assert mine.shape == other.shape
        assert_no_worse(mine, other, array(right), f"result {what}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 2])
def test_log_sum_exps(shift, reduction):
    """They are differentiable, for a z-loss."""

    def total(values):
        loss, lse = values
        return loss.sum() + 1e-2 * lse.square().sum()

    def ours(hidden, weight, bias):
        keywords = {"shift": shift, "reduction": reduction, "return_lse": True}
        return total(cce.linear_cross_entropy(hidden, weight, TARGETS, bias, **keywords))

    assert_same(ours, lambda *leaves: total(plain(*leaves, shift, None, reduction)), MODEL)
    loss, lse = cce.LinearCrossEntropy(shift=shift, reduction=reduction, return_lse=True)(*MODEL[:2], TARGETS)
    assert lse.shape == (BATCH, TIME - shift) and (reduction != "none" or loss.shape == lse.shape)


def test_no_shifted_copy_is_made():
    """A shift concerns the targets; the last hidden states get no gradient."""
    hidden = MODEL.hidden.clone().requires_grad_()
    cce.linear_cross_entropy(hidden, MODEL.weight, TARGETS.clamp(min=0), shift=3).backward()
    assert not hidden.grad[:, -3:].any() and hidden.grad[:, :-3].any(-1).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_counts(reduction):
    """CCE's mean is NaN there."""
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    for return_lse in (False, True):
        found = cce.linear_cross_entropy(
            hidden, torch.randn(7, 4), torch.full((1, 3), -100), reduction=reduction, return_lse=return_lse
        )
        loss = found[0] if return_lse else found
        loss.sum().backward()
        assert not loss.any() and not hidden.grad.any()


def of_rank(rank, ranks, *, known, reduce_e_grad):
    options = cce.VocabParallelOptions.from_vocab(VOCAB - 1, reduce_e_grad=reduce_e_grad)
    if not known:
        options = cce.VocabParallelOptions(options.start, options.stop, None, reduce_e_grad)
    hidden, rows, bias = (
        part.clone().requires_grad_()
        for part in (MODEL.hidden, *(part[options.start : options.stop] for part in MODEL[1:]))
    )
    targets = TARGETS.where(TARGETS < VOCAB - 1, 0)
    loss = cce.linear_cross_entropy(hidden, rows, targets, bias, shift=1, vocab_parallel_options=options)
    loss.backward()
    e_grad = hidden.grad.clone()
    if not reduce_e_grad:
        dist.all_reduce(e_grad)
    return loss.detach(), e_grad, rows.grad, bias.grad


@pytest.mark.parametrize("reduce_e_grad", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_vocab_parallel(known, reduce_e_grad):
    """Three ranks, one of them with a row more, or less, than the others."""
    found = run_threads(functools.partial(of_rank, known=known, reduce_e_grad=reduce_e_grad), 3)
    targets = TARGETS.where(TARGETS < VOCAB - 1, 0)
    leaves = [part.clone().requires_grad_() for part in (MODEL.hidden, MODEL.weight[:-1], MODEL.bias[:-1])]
    loss = cce.linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], shift=1)
    whole = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for rank in found:
        torch.testing.assert_close(rank[0], whole[0])
        torch.testing.assert_close(rank[1], whole[1])
    for part in (2, 3):
        torch.testing.assert_close(torch.cat([rank[part] for rank in found]), whole[part])


def test_signatures():
    """Those of the release are among them, by name; its options have the same meaning."""
    package = pytest.importorskip("cut_cross_entropy")
    for name in ("linear_cross_entropy", "LinearCrossEntropy"):
        mine, theirs = (inspect.signature(getattr(one, name)).parameters for one in (cce, package))
        assert theirs.keys() <= mine.keys()
    assert {one.name for one in package.LinearCrossEntropyImpl} <= {one.name for one in cce.LinearCrossEntropyImpl}


REFUSED = [
    ({"bias": -100}, "bias"),
    ({"reduction": "batchmean"}, "reduction"),
    ({"softcap": -1.0}, "softcap"),
    ({"shift": TIME}, "shift"),
    ({"shift": -1}, "shift"),
    ({"shift": 1.5}, "shift"),
    ({"filter_eps": "low"}, "filter_eps"),
    ({"filter_eps": 2.0}, "filter_eps"),
    ({"filter_e_grad": 1}, "filter_e_grad"),
    ({"accum_c_fp32": None}, "accum_c_fp32"),
    ({"impl": "liger"}, "impl"),
    ({"targets": TARGETS.float()}, "targets"),
    ({"c": None}, "c must"),
]


@pytest.mark.parametrize(("keywords", "name"), REFUSED, ids=str)
def test_refused(keywords, name):
    with pytest.raises((ValueError, TypeError), match=name):
        cce.linear_cross_entropy(**({"e": MODEL.hidden, "c": MODEL.weight, "targets": TARGETS} | keywords))
