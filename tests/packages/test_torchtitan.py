"""torchtitan's trainer with this library's loss in the place of its own."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchtitan")

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.models.common.linear import Linear
from torchtitan.models.muse_glimmer.model import SoftCappedLinear
from torchtitan.protocols.module import Module

from chunked_ce.integrations.torchtitan import ChunkedCrossEntropyLoss
from tests.distributed.launch import run
from tests.integrations.training import largest_allocation
from tests.packages.comparison import assert_same
from tests.packages.torchtitan_training import SEQ, VOCAB, by_hand, compare, head_after_its_gradient

WIDTH = 24
TENSOR = {"spmd_backend": "partial_dtensor", "tensor_parallel_degree": 2}
SETTINGS = {
    1: {
        "spmd_types": {},
        "compiled": {"compile_loss": True},
        "accumulation": {"accumulation": 2},
        "tied": {"tied": True},
        "prediction of three tokens": {"mtp": 2},
    },
    2: {
        "data": {"parallelism": {"spmd_backend": "partial_dtensor"}},
        "data, resharded, prediction of two tokens": {
            "parallelism": {"spmd_backend": "partial_dtensor", "fsdp_reshard_after_forward": "always"},
            "mtp": 1,
            "compile_loss": True,
        },
        "replicated data": {"parallelism": {"spmd_backend": "partial_dtensor", "data_parallel_replicate_degree": 2}},
        "tensor, sequence": {"parallelism": TENSOR, "accumulation": 2},
        "tensor, tied, compiled": {
            "parallelism": TENSOR | {"enable_sequence_parallel": False},
            "tied": True,
            "compile_loss": True,
        },
        "tensor, prediction of three tokens": {"parallelism": TENSOR, "mtp": 2},
    },
}


@pytest.mark.parametrize("world_size", SETTINGS)
def test_three_steps_of_its_trainer(world_size):
    """The losses and parameters of torchtitan's plain and chunked losses."""
    settings = SETTINGS[world_size]
    for results in run(compare, world_size, list(settings.values())):
        for name, found in zip(settings, results, strict=True):
            losses, weights = found.pop("plain")
            assert len(losses) == 3 and len(set(losses)) == 3
            for other, (its_losses, its_weights) in found.items():
                assert its_losses == pytest.approx(losses, rel=1e-6), (name, other)
                for key, weight in weights.items():
                    error = (its_weights[key] - weight).abs().max()
                    assert error <= 1e-6 * weight.abs().max(), (name, other, key, error)


def test_backends_by_hand():
    """The full-DTensor backend, and a vocabulary in the shards of spmd_types, whose FSDP2 needs a later torch."""
    for found in run(by_hand, 2):
        assert len(found) == 3
        for name, ((kinds, *theirs), (own_kinds, *mine)) in found.items():
            assert own_kinds == kinds, name
            for one, other in zip(mine, theirs, strict=True):
                assert (one - other).abs().max() <= 1e-6 * other.abs().max(), name


def test_fsdp_releases_the_head_before_the_rest_of_the_backward():
    """Its gradient is reduced, and its weight is given back, as soon as the hidden states have their gradient."""
    assert run(head_after_its_gradient, 2) == [("DTensor", True)] * 2


# ---- the loss alone ----


def head_of(weight, **config):
    """torchtitan's head, with this weight."""
    kind = SoftCappedLinear if config else Linear
    head = kind.Config(in_features=weight.shape[1], out_features=len(weight), **config).build()
    del head.weight
    head.weight = weight  # which may need a gradient without being a parameter
    return head


def loss_of(head, **config):
    loss_fn = ChunkedCrossEntropyLoss.Config(**config).build()
    loss_fn.set_lm_head(head)
    return loss_fn


def problem(tokens=SEQ, width=WIDTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(2, tokens, width, generator=g), torch.randn(VOCAB, width, generator=g) / 3
    labels = torch.randint(VOCAB, (2, tokens), generator=g)
    labels[0, : tokens // 3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("tokens", [None, 23])
@pytest.mark.parametrize("config", [{}, {"output_multiplier": 0.7, "output_soft_cap_temp": 2.0}], ids=str)
def test_value_and_gradients(config, tokens):
    hidden, weight, labels = problem()
    count = None if tokens is None else torch.tensor(tokens)

    def mine(hidden, weight):
        return loss_of(head_of(weight, **config), chunk_size=5)(hidden, labels, count)[0]

    def theirs(hidden, weight):
        return CrossEntropyLoss.Config().build()(head_of(weight, **config)(hidden), labels, count)[0]

    assert_same(mine, theirs, (hidden, weight))


def test_the_terms():
    hidden, weight, labels = problem()

    def mine(hidden, weight):
        return loss_of(head_of(weight), label_smoothing=0.2, z_loss=0.01)(hidden, labels)[0]

    def theirs(hidden, weight):
        logits, target = (hidden @ weight.t()).flatten(0, 1), labels.flatten()
        squares = logits.logsumexp(-1).square()[target != -100].sum()
        return F.cross_entropy(logits, target, reduction="sum", label_smoothing=0.2) + 0.01 * squares

    assert_same(mine, theirs, (hidden, weight))


def test_metrics_add_up():
    """The sums over micro-batches are those of all tokens together, as torchtitan combines them by their names."""
    hidden, weight, labels = problem(tokens=2 * SEQ)
    count = (labels != -100).sum()
    loss_fn = loss_of(head_of(weight), metrics=True)
    whole = loss_fn(hidden, labels, count)[1]
    combined = {}
    for states, targets in zip(hidden.split(SEQ, 1), labels.split(SEQ, 1), strict=True):
        combined = ChunkedLossWrapper._combine_chunk_metrics(combined, loss_fn(states, targets, count)[1])
    torch.testing.assert_close(combined, whole)
    torch.testing.assert_close(loss_fn(hidden, labels)[1], whole)
    logits, counted = (hidden @ weight.t()), labels != -100
    log_p = logits.log_softmax(-1)
    expected = {
        "accuracy/frac": (logits.argmax(-1) == labels)[counted].float().mean(),
        "entropy/mean": -(log_p.exp() * log_p).sum(-1)[counted].mean(),
        "lse/max": logits.logsumexp(-1)[counted].max(),
    }
    torch.testing.assert_close(whole, expected)


def test_validation_frozen_tensors_and_no_tokens():
    hidden, weight, labels = problem()
    head = head_of(weight.requires_grad_())
    loss_fn = loss_of(head)
    with torch.no_grad():
        assert not loss_fn(hidden, labels)[0].requires_grad
    loss_fn(hidden, labels)[0].backward()  # frozen hidden states
    expected, weight.grad = weight.grad, None
    states = hidden.clone().requires_grad_()
    (loss_fn(states, labels)[0] / 2).backward()
    torch.testing.assert_close(weight.grad, expected / 2)
    weight.requires_grad_(False)
    loss_fn(states, labels)[0].backward()  # a frozen head
    for count in (None, torch.tensor(7), torch.tensor(0)):
        loss, _ = loss_fn(states, torch.full_like(labels, -100), count)
        loss.backward()
        assert loss == 0 and states.grad.isfinite().all()
    assert loss_fn(states[:, :1], labels[:, -1:])[0] > 0  # a token of each sequence
    assert "forward" not in vars(head)


def test_bf16():
    """No further from the exact loss than torchtitan's own is."""
    hidden, weight, labels = problem()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = loss_of(head_of(weight.double()))(hidden.double(), labels)[0]
    mine = loss_of(head_of(weight), logits_dtype="float32")(hidden, labels)[0]
    theirs = CrossEntropyLoss.Config().build()(head_of(weight)(hidden), labels)[0]
    assert mine.dtype == torch.float32
    assert (mine - exact).abs() <= (theirs - exact).abs()


def test_the_largest_tensor():
    hidden, _, labels = problem(tokens=512, width=8)
    head = head_of(torch.randn(50_000, 8, requires_grad=True))
    loss_fn = loss_of(head)

    def step():
        loss_fn(hidden.clone().requires_grad_(), labels)[0].backward()

    assert largest_allocation(step) < 0.1 * labels.numel() * 50_000 * 4


def test_hooks_of_the_head_run():
    hidden, weight, labels = problem()
    head, seen = head_of(weight), []
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    loss_of(head)(hidden, labels)
    assert seen == ["before", "after"]


def test_the_command_line(monkeypatch):
    """The fields of the configuration are options of torchtitan's command line, and its logs can hold them."""
    from torchtitan.config.manager import ConfigManager
    from torchtitan.models.llama3 import config_registry

    def llama3_with_this_loss():
        config = config_registry.llama3_debugmodel()
        config.loss = ChunkedCrossEntropyLoss.Config(z_loss=1e-4)
        return config

    monkeypatch.setattr(config_registry, "llama3_with_this_loss", llama3_with_this_loss, raising=False)
    arguments = ["--module", "llama3", "--config", "llama3_with_this_loss"]
    options = ["--loss.chunk_size", "7", "--loss.logits_dtype", "float32", "--loss.metrics"]
    loss = ConfigManager().parse_args(arguments + options).loss
    assert json.loads(json.dumps(loss.to_dict())).items() >= {"chunk_size": 7, "z_loss": 1e-4, "metrics": True}.items()
    built = loss.build().keywords["options"]
    assert (built.chunk_size, built.logits_dtype) == (7, torch.float32)


def test_bad_arguments():
    hidden, weight, labels = problem()
    config = ChunkedCrossEntropyLoss.Config
    for name, value in {
        "label_smoothing": 2.0,
        "z_loss": -1.0,
        "mtp_scale": -0.1,
        "chunk_size": 0,
        "gradients": "sideways",
        "logits_dtype": "float64",
        "gradient_filter": 2.0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            config(**{name: value}).build()
    loss_fn = config().build()
    with pytest.raises(RuntimeError, match="set_lm_head"):
        loss_fn(hidden, labels)

    class Other(Linear, Module):
        def forward(self, input):
            return super().forward(input) * 2

    other = nn.Linear(4, 8)
    other.forward = lambda input: input
    for head in (Other(Linear.Config(in_features=4, out_features=8)), other, nn.Identity()):
        with pytest.raises(ValueError, match=f"lm_head must compute .* was {type(head).__name__}"):
            loss_fn.set_lm_head(head)
    loss_fn.set_lm_head(head_of(weight))
    with pytest.raises(TypeError, match="loss_mask is not an argument of this loss: allowed is positions"):
        loss_fn(hidden, labels, loss_mask=labels)
    with pytest.raises(ValueError, match="positions must be given"):
        loss_fn([hidden, hidden], labels)
    with pytest.raises(ValueError, match="target"):
        loss_fn(hidden[:, 1:], labels)
    with pytest.raises(ValueError, match="metrics must be False"):
        loss_of(head_of(weight), metrics=True)([hidden, hidden], labels, positions=labels)
