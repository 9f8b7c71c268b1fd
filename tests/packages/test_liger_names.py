"""Liger's names in `chunked_ce.integrations.liger` against Liger itself: arguments, values, gradients and refusals."""

import inspect
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Liger's kernels run on a CPU under TRITON_INTERPRET=1 only", allow_module_level=True)
liger_kernel = pytest.importorskip("liger_kernel")

import liger_kernel.ops.cross_entropy as kernels  # noqa: E402
import triton  # noqa: E402
from liger_kernel import chunked_loss, transformers  # noqa: E402
from liger_kernel.transformers import functional  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from chunked_ce import linear_logprobs  # noqa: E402
from chunked_ce.integrations import liger  # noqa: E402
from tests.packages.comparison import VOCAB, assert_same, model, responses, result  # noqa: E402

TOKENS = 40
TARGET = responses(4, TOKENS // 4).view(-1)
COUNTED = TARGET != -100
STUDENT, TEACHER = model(TOKENS), model(TOKENS, width=24, seed=1)
CLASSES = torch.rand(VOCAB, generator=torch.Generator().manual_seed(2)) + 0.5
TERMS = {
    "plain": {},
    "classes": {"ce_weight": CLASSES},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 2.0},
    "z_loss": {"lse_square_scale": 1e-2},
    "classes z_loss": {"ce_weight": CLASSES, "lse_square_scale": 1e-2},
    "scaling": {"use_token_scaling": True},
    "all": {
        "ce_weight": CLASSES,
        "label_smoothing": 0.1,
        "softcap": 3.0,
        "lse_square_scale": 1e-2,
        "use_token_scaling": True,
    },
}
BESIDE = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Liger runs on a GPU here, these inputs do not")


class Scalar(float):
    def to(self, dtype):
        return self


def tanh(values):
    return 2 * triton.language.sigmoid(2 * values) - 1


@pytest.fixture(autouse=True)
def what_the_interpreter_lacks(monkeypatch):
    """Numbers with a method ``to``, and the device's tanh, which kernels of Liger have on a GPU."""
    convert = interpreter._implicit_cvt
    monkeypatch.setattr(interpreter, "_implicit_cvt", lambda x: Scalar(x) if type(x) is float else convert(x))
    monkeypatch.setattr(kernels, "tanh", tanh)


def in_dtype(terms, dtype):
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in terms.items()}


def assert_close(ours, theirs):
    """Numbers beside a loss, up to the roundings of their sums."""
    assert (ours is None) == (theirs is None)
    if ours is None:
        return
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and not ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


NAMES = [name for name in liger.__all__ if name != "CrossEntropyOutput"]


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    """Names, order and defaults are Liger's, so that a call need not change."""
    theirs = getattr(transformers, name, None) or getattr(chunked_loss, name, None) or getattr(functional, name)
    pairs = [(getattr(liger, name), theirs)]
    if inspect.isclass(theirs):
        pairs = [(getattr(one, part), getattr(other, part)) for one, other in pairs for part in ("__init__", "forward")]
    for one, other in pairs:
        mine, wanted = ([*inspect.signature(each).parameters.values()] for each in (one, other))
        assert [(x.name, x.default) for x in mine if x.name != "shift_labels"] == [
            (x.name, x.default) for x in wanted if x.name != "shift_labels"
        ]
        assert [x.name for x in mine] == [x.name for x in wanted]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_fused_linear_cross_entropy(terms, reduction):
    def of(package):
        def value(hidden, weight, bias):
            loss = package.LigerFusedLinearCrossEntropyLoss(reduction=reduction, **in_dtype(terms, hidden.dtype))
            return loss(weight, hidden, TARGET, bias)

        return value

    assert_same(of(liger), of(transformers), STUDENT)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_what_comes_beside_a_fused_loss(terms, reduction):
    found = [
        one.liger_fused_linear_cross_entropy(
            STUDENT.hidden, STUDENT.weight, TARGET, STUDENT.bias, reduction=reduction, **terms, **BESIDE
        )
        for one in (liger, functional)
    ]
    for name in ("loss", "z_loss", "token_accuracy", "predicted_tokens"):
        assert_close(*(getattr(one, name) for one in found))
    assert (found[0].predicted_tokens == -1).equal(~COUNTED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", [name for name in TERMS if name not in ("scaling", "all")])
def test_cross_entropy(terms, reduction):
    """Liger writes the gradients of the logits over these; here they stay."""
    terms = {"weight" if name == "ce_weight" else name: value for name, value in TERMS[terms].items()}
    logits = STUDENT.hidden @ STUDENT.weight.T + STUDENT.bias

    def of(package):
        def value(logits):
            loss = package.LigerCrossEntropyLoss(reduction=reduction, **in_dtype(terms, logits.dtype))
            return loss(logits.clone(), TARGET)

        return value

    assert_same(of(liger), of(transformers), [logits])
    before = logits.clone()
    found = [
        one.liger_cross_entropy(values, TARGET, reduction=reduction, **terms, **BESIDE)
        for one, values in ((liger, logits), (functional, logits.clone()))
    ]
    assert torch.equal(logits, before)
    for name in ("loss", "z_loss", "token_accuracy", "predicted_tokens"):
        assert_close(*(getattr(one, name) for one in found))


@pytest.mark.parametrize("labels", [TARGET, None], ids=["labels", "no labels"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 2.0), (0.5, 1.0), (0.3, 1.7)])
def test_jsd(beta, temperature, labels):
    def of(package):
        loss = package.LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature)
        return lambda hidden, weight: loss(
            hidden, weight, TEACHER.hidden.to(hidden.dtype), TEACHER.weight.to(hidden.dtype), labels
        )

    assert_same(of(liger), of(transformers), STUDENT[:2])


@pytest.mark.parametrize(("hard", "beta", "temperature"), [(0.5, 0.5, 1.0), (0.0, 0.0, 2.0), (0.3, 1.0, 1.5)])
def test_distillation(hard, beta, temperature):
    def of(package, more=False):
        loss = package.LigerFusedLinearJSDLoss(
            hard, 0.7, beta, -100, temperature, compiled=False, return_soft_hard_loss=more
        )

        def value(hidden, weight, bias):
            teacher = [part.to(hidden.dtype) for part in TEACHER]
            return loss(hidden, weight, *teacher[:2], TARGET, bias, teacher[2])

        return value

    assert_same(of(liger), of(chunked_loss), STUDENT)
    for one, other in zip(of(liger, True)(*STUDENT), of(chunked_loss, True)(*STUDENT), strict=True):
        assert_close(one, other)


PAIRS, TIME = 4, 9
SEQUENCES = responses(2 * PAIRS, TIME)
POLICY, REFERENCE = model(2 * PAIRS, TIME), model(2 * PAIRS, TIME, width=24, seed=1)
PREFERENCES = {
    "DPO": [{}, {"beta": 0.5, "compute_nll_loss": True, "alpha": 0.3, "average_log_prob": True}],
    "DPO alone": [{"use_ref_model": False}],
    "ORPO": [{}, {"beta": 0.8, "compute_nll_loss": False}],
    "SimPO": [{}, {"beta": 2.0, "gamma": 1.2, "label_smoothing": 0.1, "alpha": 0.4}],
    "CPO": [{}, {"beta": 0.4, "alpha": 0.6, "label_smoothing": 0.2, "average_log_prob": True}],
}


def compare(of, leaves):
    """``of(package)(*leaves)`` is a loss and what comes beside it."""
    assert_same(*(lambda *x, one=one: of(one)(*x)[0] for one in (liger, chunked_loss)), leaves)
    beside = [of(one)(*leaves)[1] for one in (liger, chunked_loss)]
    for one, other in zip(*beside, strict=True):
        assert_close(one, torch.as_tensor(other).detach())


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, all_of in PREFERENCES.items() for options in all_of], ids=str
)
def test_preferences(name, options):
    def of(package):
        loss = getattr(package, f"LigerFusedLinear{name.split()[0]}Loss")(compiled=False, **options)

        def value(hidden, weight, bias):
            reference = [part.to(hidden.dtype) for part in REFERENCE] if name == "DPO" else []
            return loss(weight, hidden, SEQUENCES, bias, *reference)

        return value

    compare(of, POLICY)


def test_orpo_with_other_targets_of_its_likelihood():
    others = responses(2 * PAIRS, TIME, seed=5)

    def of(package):
        loss = package.LigerFusedLinearORPOLoss(compiled=False)
        return lambda hidden, weight, bias: loss(weight, hidden, SEQUENCES, bias, others)

    compare(of, POLICY)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("kl", [None, torch.tensor(1.3), torch.tensor(-0.4), torch.linspace(-1, 1, 2 * PAIRS)], ids=str)
def test_kto(kl, averaged):
    labels = torch.tensor([True, False, True, True, False, False, True, False])

    def of(package):
        options = {"use_ref_model": True, "average_log_prob": averaged, "compiled": False}
        # In smaller chunks, Liger takes the points of all sequences for each of them.
        loss = package.LigerFusedLinearKTOLoss(chunk_size=2 * PAIRS, **options)

        def value(hidden, weight, bias):
            reference = [part.to(hidden.dtype) for part in REFERENCE]
            return loss(hidden, weight, SEQUENCES, bias, labels, *reference, kl=kl)

        return value

    compare(of, POLICY)


G = torch.Generator().manual_seed(3)
MASK = SEQUENCES != -100
ADVANTAGE = torch.tensor([1.3, -0.8, 1.4, -0.3, 0.9, 0.7, -1.1, 0.4])
LOGPROBS = linear_logprobs(POLICY.hidden, POLICY.weight, SEQUENCES, linear_bias=POLICY.bias)
OLD, REF = (LOGPROBS + spread * torch.randn(SEQUENCES.shape, generator=G) for spread in (0.6, 0.3))
NEARBY = POLICY.hidden + 0.1 * torch.randn(POLICY.hidden.shape, generator=G), *POLICY[1:]
POLICIES = [
    {"loss_type": "grpo", "beta": 0.0, "use_ref_model": False},
    {"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.4},
    {"loss_type": "dr_grpo", "max_completion_length": 12, "temperature": 1.2},
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "use_ref_model": False},
    {"loss_type": "cispo", "epsilon_high": 1.25},
]


@pytest.mark.parametrize("more", ["", "ratio", "reference model", "items"])
@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_policies(options, more):
    def of(package):
        loss = package.LigerFusedLinearGRPOLoss(compiled=False, **options)

        def value(hidden, weight, bias):
            given = {"old_per_token_logps": OLD, "ref_per_token_logps": REF}
            if more == "ratio":
                given["vllm_is_ratio"] = torch.linspace(0.5, 1.5, 2 * PAIRS)
            if more == "items":
                given["num_items_in_batch"] = 77
            if more == "reference model":
                reference = [part.to(hidden.dtype) for part in NEARBY]
                given |= dict(zip(("ref_input", "ref_weight", "ref_bias"), reference, strict=True))
                del given["ref_per_token_logps"]
            ids = SEQUENCES.where(MASK, 0)
            given = {name: one.to(hidden.dtype) if one is OLD or one is REF else one for name, one in given.items()}
            return loss(hidden, weight, ids, MASK.float(), ADVANTAGE, bias, **given)

        return value

    compare(of, POLICY)


def test_frozen_tensors_and_none():
    """A frozen head still lets the bias and the hidden states learn; without grad there is none."""
    hidden, weight, bias = (part.clone() for part in STUDENT)
    hidden.requires_grad_()
    bias.requires_grad_()
    loss = liger.LigerFusedLinearCrossEntropyLoss()
    loss(weight, hidden, TARGET, bias).backward()
    whole = result(lambda *x: loss(x[1], x[0], TARGET, x[2]).view(1), STUDENT)
    torch.testing.assert_close([hidden.grad, bias.grad], [whole[1] * 2, whole[3] * 2])
    with torch.no_grad():
        assert not loss(weight, hidden, TARGET, bias).requires_grad


def test_dtypes():
    """A fused loss is float32; one of logits, and z-losses, have the dtype of what is given."""
    hidden, weight, bias = (part.bfloat16() for part in STUDENT)
    options = {"lse_square_scale": 0.1, "return_z_loss": True}
    found = [
        one.liger_fused_linear_cross_entropy(hidden, weight, TARGET, bias, **options) for one in (liger, functional)
    ]
    logits = hidden @ weight.T
    found += [one.liger_cross_entropy(logits.clone(), TARGET, **options) for one in (liger, functional)]
    for ours, theirs in (found[:2], found[2:]):
        assert (ours.loss.dtype, ours.z_loss.dtype) == (theirs.loss.dtype, theirs.z_loss.dtype)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-2, atol=0)


@pytest.mark.parametrize("terms", [{}, {"lse_square_scale": 1e-2}], ids=str)
def test_class_weights_below_zero(terms):
    """Their sum, by which a mean divides, may be below 0 as well: Liger asks for no sign."""
    weights = CLASSES - 1.2

    def of(package):
        def value(hidden, weight, bias):
            loss = package.LigerFusedLinearCrossEntropyLoss(weights.to(hidden.dtype), **terms)
            return loss(weight, hidden, TARGET, bias)

        return value

    assert weights[TARGET[COUNTED]].sum() < -1
    assert_same(of(liger), of(transformers), STUDENT)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_no_token_counts(tokens, reduction):
    """Liger divides by 0 there."""
    hidden = torch.randn(tokens, 4, requires_grad=True)
    target = torch.full((tokens,), -100)
    loss = liger.LigerFusedLinearCrossEntropyLoss(reduction=reduction, lse_square_scale=0.1, **BESIDE)
    output = loss(torch.randn(7, 4), hidden, target)
    output.loss.sum().backward()
    for value in (output.loss, output.z_loss, output.token_accuracy, hidden.grad):
        assert not value.any()
    assert (output.predicted_tokens == -1).all()


REFUSED = [
    (lambda: liger.LigerFusedLinearCrossEntropyLoss(reduction="batchmean"), "reduction"),
    (lambda: liger.LigerFusedLinearCrossEntropyLoss(lse_square_scale=-1.0), "lse_square_scale"),
    (lambda: liger.LigerFusedLinearCrossEntropyLoss(label_smoothing=2.0), "label_smoothing"),
    (lambda: liger.LigerCrossEntropyLoss(softcap=0.0), "softcap"),
    (lambda: liger.liger_cross_entropy(STUDENT.hidden, TARGET, size_average=True), "size_average"),
    (lambda: liger.liger_cross_entropy(STUDENT.hidden, TARGET, reduce=True), "reduce"),
    (lambda: liger.LigerFusedLinearDPOLoss(loss_type="hinge"), "loss_type"),
    (lambda: liger.LigerFusedLinearDPOLoss(label_smoothing=0.1), "label_smoothing"),
    (lambda: liger.LigerFusedLinearDPOLoss(discopop_tau=0.1), "discopop_tau"),
    (lambda: liger.LigerFusedLinearDPOLoss(chunk_size=0), "chunk_size"),
    (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="sapo"), "loss_type"),
    (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="dr_grpo"), "max_completion_length"),
    (lambda: liger.LigerFusedLinearGRPOLoss(delta=2.0), "delta"),
    (lambda: liger.LigerFusedLinearGRPOLoss(importance_sampling_level="sequence"), "importance_sampling_level"),
    (lambda: liger.LigerFusedLinearGRPOLoss(use_bias_correction_kl=True), "use_bias_correction_kl"),
    (lambda: liger.LigerFusedLinearGRPOLoss(vespo_k_pos=1.0), "vespo_k_pos"),
    (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="cispo", epsilon_high=0.2), "epsilon_high"),
    (lambda: liger.LigerFusedLinearDPOLoss()(POLICY.weight, POLICY.hidden, SEQUENCES), "ref_input"),
    (
        lambda: liger.LigerFusedLinearDPOLoss(use_ref_model=False)(
            POLICY.weight, POLICY.hidden, SEQUENCES, None, POLICY.hidden
        ),
        "ref_input",
    ),
    (lambda: liger.LigerFusedLinearKTOLoss()(POLICY.hidden, POLICY.weight, SEQUENCES), "preference_labels"),
    (lambda: liger.LigerFusedLinearCPOLoss()(POLICY.weight, POLICY.hidden[:3], SEQUENCES[:3]), "pairs"),
    (
        lambda: liger.liger_fused_linear_cross_entropy(
            STUDENT.hidden, STUDENT.weight, TARGET, accum_dtype=torch.float16
        ),
        "accum_dtype",
    ),
    (
        lambda: liger.liger_fused_linear_cross_entropy(STUDENT.hidden, STUDENT.weight, TARGET, chunk_mem_const=0),
        "chunk_mem_const",
    ),
]


@pytest.mark.parametrize(("call", "name"), REFUSED, ids=[f"{i} {name}" for i, (_, name) in enumerate(REFUSED)])
def test_refused(call, name):
    with pytest.raises((ValueError, TypeError), match=name):
        call()
