"""The example of distillation: its losses against the contract's formulas, and real processes over gloo."""

import pytest
import torch
from common import distillation
from common.distillation import TAILS
from common.model import ModelConfig, Transformer
from common.teacher import CHUNK, HiddenStates, LikeliestWords, top_k
from common.text_data import IGNORED, TextBatches, load_tokens
from torch import Tensor

from tests.examples.commands import EXAMPLES, losses, run

SCRIPT = EXAMPLES / "distill.py"
STEPS, CONTEXT, SEQUENCES = 8, 16, 4
SIZES = ["--teacher-width=32", "--student-width=16", "--depth=1", "--heads=2", f"--context={CONTEXT}", "--top-k=512"]

# As in `test_train_deepspeed.py`. A mean of means over the ranks is off by 1e-3 (KL) and 2e-4 (top-K).
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def arguments(text) -> list:
    return [SCRIPT, *SIZES, "--teacher-steps=24", f"--steps={STEPS}", "--precision=fp32", f"--text={text}"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, arguments):
    """The directory that two ranks left behind, and what they printed."""
    out = tmp_path_factory.mktemp("distill") / "out"
    batch = f"--micro-batch={SEQUENCES // 2}"
    return out, run(*arguments, "--ranks=2", batch, f"--out={out}", log=out.with_name("log"))


@pytest.mark.parametrize("method", ["kl", "top-k"])
def test_chunked_and_full_logits_give_the_same_losses(two_ranks, method):
    chunked, full = (losses(two_ranks[0] / f"{method}-{loss}") for loss in ("chunked", "full"))
    assert len(chunked) == STEPS
    assert chunked == pytest.approx(full, abs=TOLERANCE, rel=0)


def test_the_student_learns(two_ranks):
    kl = losses(two_ranks[0] / "kl-chunked")
    assert kl[-1] < kl[0] - 0.02


def test_report_and_plot(two_ranks):
    out, printed = two_ranks
    report = (out / "report.txt").read_text()
    assert report in printed
    assert report.count("largest difference of a loss: ") == report.count("peak memory, MiB") == 2
    assert "KL with beta 0, top-K with K 512 and tail bucket" in report
    assert (out / "distill.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough  # the reductions over ranks are tested by tests/distributed/test_windows.py as well
def test_one_rank_with_all_sequences_gives_the_same_losses(two_ranks, tmp_path, arguments, text):
    batches = TextBatches(load_tokens([text]), CONTEXT, mask_prompt=True)
    for step in range(1, STEPS + 1):
        shape = {"micro_batches": 1, "batch": SEQUENCES // 2, "ranks": 2}
        first, second = ((batches.step(step, rank=rank, **shape)[1] != IGNORED).sum() for rank in (0, 1))
        if first != second:
            break
    assert first != second, "ranks must hold different numbers of tokens, or any mean would do"
    run(*arguments, "--ranks=1", f"--micro-batch={SEQUENCES}", f"--out={tmp_path / 'out'}", log=tmp_path / "log")
    for name in ("kl-chunked", "kl-full", "top-k-chunked", "top-k-full"):
        assert losses(tmp_path / "out" / name) == pytest.approx(losses(two_ranks[0] / name), abs=TOLERANCE, rel=0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Section 10 of the contract, in float64."""
    mixture = beta * p + (1 - beta) * q
    return {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, mixture) + (1 - beta) * kl(q, mixture))


def top_k_divergence(p: Tensor, q: Tensor, tail: str) -> Tensor:
    """The same, of probabilities (N, K)."""
    if tail == "renormalize":
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    bucket = kl(1 - p.sum(-1), 1 - q.sum(-1)) if tail == "bucket" else 0
    return kl(p, q) + bucket


class Case:
    """Seven tokens, two of them ignored, of a student of width 6 and a teacher of width 10."""

    def __init__(self):
        torch.manual_seed(0)
        self.hidden = torch.randn(7, 6, requires_grad=True)
        self.head = torch.randn(40, 6, requires_grad=True)
        self.teacher_hidden, self.teacher_head = torch.randn(7, 10), torch.randn(40, 10)
        self.targets = torch.tensor([3, IGNORED, 0, 39, 5, IGNORED, 1])
        counted = self.targets != IGNORED
        self.student = (self.hidden.double() @ self.head.double().T)[counted].softmax(-1)
        self.teacher = (self.teacher_hidden.double() @ self.teacher_head.double().T)[counted].softmax(-1)

    def check(self, loss: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        leaves = (self.hidden, self.head)
        for found, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", distillation.LOSSES["kl"].values())
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence(loss, beta):
    case = Case()
    found = loss(case.hidden, case.head, case.targets, case.teacher_hidden, teacher_head=case.teacher_head, beta=beta)
    case.check(found, divergence(case.teacher, case.student, beta))


@pytest.mark.parametrize("loss", distillation.LOSSES["top-k"].values())
@pytest.mark.parametrize("tail", TAILS)
def test_top_k_divergence(loss, tail):
    case = Case()
    ids, logprobs = top_k(case.teacher_hidden, case.teacher_head, k=5)
    found = loss(case.hidden, case.head, case.targets, ids.long(), logprobs, tail=tail)
    words = ids[case.targets != IGNORED].long()
    case.check(found, top_k_divergence(case.teacher.gather(-1, words), case.student.gather(-1, words), tail))


def test_likeliest_words_of_more_than_one_chunk():
    torch.manual_seed(0)
    hidden, head = torch.randn(CHUNK + 3, 8), torch.randn(50, 8)
    ids, logprobs = top_k(hidden, head, k=4)
    expected = (hidden @ head.T).log_softmax(-1).topk(4)
    assert ids.tolist() == expected.indices.tolist()
    torch.testing.assert_close(logprobs, expected.values)


def test_batches_with_words_are_those_with_hidden_states():
    config = ModelConfig(vocab=60, width=8, depth=1, heads=2, context=12)
    torch.manual_seed(0)
    teacher = Transformer(config)
    batches = TextBatches(torch.randint(60, (200,)).numpy(), config.context, mask_prompt=True)
    shape = {"micro_batches": 2, "batch": 3, "rank": 1, "ranks": 2}
    words = LikeliestWords(batches, teacher, 5, steps=2, **shape)
    for step in (1, 2):
        inputs, targets, hidden = HiddenStates(batches, teacher).step(step, **shape)
        same_inputs, same_targets, ids, logprobs = words.step(step, **shape)
        assert inputs.equal(same_inputs) and targets.equal(same_targets)
        expected = teacher.head(hidden).log_softmax(-1).topk(5)
        counted = targets != IGNORED
        assert ids[counted].equal(expected.indices[counted])
        torch.testing.assert_close(logprobs[counted], expected.values[counted])
        assert not ids[~counted].any() and not logprobs[~counted].any()
