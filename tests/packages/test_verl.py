"""verl's fused forward with this library under it, and the two functions that take verl's places."""

import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("verl")

import verl.utils.experimental.torch_functional as verl_functional
import verl.utils.kernel.linear_cross_entropy as verl_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers import monkey_patch
from verl.utils.torch_functional import calculate_sum_pi_squared_from_logits

from chunked_ce import ChunkOptions
from chunked_ce.integrations import verl as ours
from tests.distributed.launch import run
from tests.integrations.training import largest_allocation
from tests.packages.comparison import VOCAB, assert_same, model
from tests.packages.verl_ranks import fsdp_head, problem, tensor_parallel

SHAPE = (3, 20)
MODEL = model(*SHAPE)[:2]
IDS = torch.randint(VOCAB, SHAPE, generator=torch.Generator().manual_seed(5))
PER_SAMPLE = torch.tensor([0.6, 1.0, 1.7])
THEIRS, THEIR_KERNEL = verl_functional.FusedLinearForPPO, verl_kernel.linear_cross_entropy


@pytest.fixture
def installed():
    ours.install()
    yield
    ours.uninstall()


@pytest.fixture(autouse=True)
def without_trl(monkeypatch):
    """verl looks for a name in TRL that TRL 1.16 no longer has."""
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)


def theirs(hidden, weight, temperature):
    """verl's own, a sample at a time where each has its temperature."""
    fused = THEIRS(chunk_size=16)
    if not isinstance(temperature, torch.Tensor):
        return torch.stack(fused(hidden, weight, IDS, temperature=temperature))
    rows = [fused(h, weight, ids, temperature=t.item()) for h, ids, t in zip(hidden, IDS, temperature, strict=True)]
    return torch.stack([torch.stack(column) for column in zip(*rows, strict=True)])


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, PER_SAMPLE], ids=str)
def test_log_probs_and_entropies(temperature, chunk_size):
    fused = ours.FusedLinearForPPO(chunk_size=chunk_size)

    def mine(hidden, weight):
        return torch.stack(fused(hidden, weight, IDS.int(), temperature=temperature))

    assert_same(mine, lambda *leaves: theirs(*leaves, temperature), MODEL)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [0.7, PER_SAMPLE], ids=str)
def test_the_kernels_signature(reduction, temperature):
    """Flat results; a reduction is of the log-probabilities only."""

    def mine(hidden, weight):
        log_probs, entropy = ours.linear_cross_entropy(hidden, weight, IDS, temperature, reduction)
        assert log_probs.shape == (() if reduction != "none" else (IDS.numel(),))
        return torch.cat([log_probs.view(-1), entropy])

    def other(hidden, weight):
        log_probs, entropy = theirs(hidden, weight, temperature).flatten(1)
        return torch.cat([log_probs if reduction == "none" else getattr(log_probs, reduction)().view(1), entropy])

    assert_same(mine, other, MODEL)


def test_the_kernels_names():
    assert ours.linear_cross_entropy.__code__.co_varnames[:6] == (
        *("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
    )


@pytest.mark.parametrize("temperature", [1.0, PER_SAMPLE], ids=str)
def test_sum_pi_squared(temperature):
    def mine(hidden, weight):
        return ours.FusedLinearForPPO()(hidden, weight, IDS, temperature, return_sum_pi_squared=True)[2]

    def other(hidden, weight):
        divisor = temperature.view(-1, 1, 1) if isinstance(temperature, torch.Tensor) else temperature
        return calculate_sum_pi_squared_from_logits(hidden @ weight.t() / divisor)

    assert_same(mine, other, MODEL)


def test_ignored_tokens_and_no_tokens():
    hidden, weight = (x.clone().requires_grad_() for x in MODEL)
    ids = IDS.clone()
    ids[:, ::2] = -100
    found = ours.FusedLinearForPPO()(hidden, weight, ids, PER_SAMPLE, return_sum_pi_squared=True)
    assert all((x[:, ::2] == 0).all() and (x[:, 1::2] != 0).all() for x in found)
    sum(x.sum() for x in found).backward()
    assert (hidden.grad[:, ::2] == 0).all() and hidden.grad[:, 1::2].any()
    mean, _ = ours.linear_cross_entropy(hidden, weight, ids, 1.0, "mean")
    everything, _ = ours.linear_cross_entropy(hidden[:, 1::2], weight, IDS[:, 1::2])
    torch.testing.assert_close(mean, everything.mean())
    for empty in (ids[:0], torch.full_like(ids, -100)):
        log_probs, _ = ours.linear_cross_entropy(hidden[: len(empty)], weight, empty, 1.0, "mean")
        log_probs.backward()
        assert log_probs == 0 and hidden.grad.isfinite().all()


def test_bf16_and_frozen_tensors():
    """fp32 results of bf16 tensors, as exact as verl's of the same; a frozen head gets nothing."""
    hidden, weight = (x.bfloat16() for x in MODEL)
    weight.requires_grad_(False)
    hidden.requires_grad_()
    options = ChunkOptions(logits_dtype=torch.float32)
    log_probs, entropy = ours.FusedLinearForPPO(options=options)(hidden, weight, IDS)
    exact = torch.stack(ours.FusedLinearForPPO()(hidden.detach().double(), weight.double(), IDS))
    assert log_probs.dtype == entropy.dtype == torch.float32
    for mine, other, right in zip((log_probs, entropy), THEIRS()(hidden, weight, IDS), exact, strict=True):
        assert (mine - right).abs().max() < 0.1 * (other - right).abs().max()
    (log_probs.sum() - entropy.sum()).backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad is None


def test_tensor_parallel():
    """Two ranks give what one gives; the input's gradient is each rank's share, as of verl's kernel, or complete."""
    hidden, weight, ids, upstream = problem()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = ours.linear_cross_entropy(*leaves, ids, torch.tensor([0.7, 1.3]))
    torch.autograd.backward(expected, list(upstream))
    ranks = run(tensor_parallel, 2)
    for input_grad in ("partial", "complete", "dtensor"):
        outputs, inputs, rows = zip(*(found[input_grad] for found in ranks), strict=True)
        for found in outputs:
            torch.testing.assert_close(found, [x.detach() for x in expected])
        torch.testing.assert_close(torch.cat(rows), leaves[1].grad)
        complete = sum(inputs) if input_grad == "partial" else inputs[0]
        torch.testing.assert_close(complete, leaves[0].grad)
        assert torch.allclose(inputs[0], inputs[1]) == (input_grad != "partial")


def test_a_head_that_fsdp_shards():
    """Each rank has the log-probabilities of its own tokens, and the head the mean of the ranks' gradients."""
    gradients = []
    ranks = run(fsdp_head, 2)
    for rank, (found, _) in enumerate(ranks):
        hidden, weight, ids, upstream = problem(seed=rank)
        weight.requires_grad_()
        outputs = ours.FusedLinearForPPO()(hidden, weight, ids, 0.8)
        torch.testing.assert_close(found, [x.detach() for x in outputs])
        torch.autograd.backward(outputs, [one.view(ids.shape) for one in upstream])
        gradients.append(weight.grad)
    for _, gradient in ranks:
        torch.testing.assert_close(gradient, torch.stack(gradients).mean(0))


# ---- a model that verl has patched ----


def language_model(vocab_size=VOCAB):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **sizes))


def train(backend, vocab_size=VOCAB, shape=SHAPE):
    """Losses and parameters of three PPO-like steps of a model that verl has patched, with an entropy bonus."""
    forward = LlamaForCausalLM.forward
    llama = language_model(vocab_size)
    monkey_patch.apply_monkey_patch(
        llama, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
    )
    try:
        optimizer = torch.optim.SGD(llama.parameters(), lr=0.5)
        g, losses = torch.Generator().manual_seed(1), []
        advantage = torch.randn(shape, generator=g)
        ids = torch.randint(vocab_size, shape, generator=g)
        old = None
        for _ in range(3):
            output = llama(input_ids=ids, temperature=0.8, return_dict=True, use_cache=False)
            log_probs, entropy = output.log_probs.view(ids.shape), output.entropy.view(ids.shape)
            old = log_probs.detach() if old is None else old
            ratio = (log_probs - old).exp()
            policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = (policy - 0.01 * entropy).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: p.detach() for name, p in llama.named_parameters()}
    finally:
        LlamaForCausalLM.forward = forward


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_three_steps_under_verls_fused_forward(backend):
    """verl's Triton kernel needs a GPU: its backend is compared with verl's in torch."""
    expected, weights = train("torch")
    ours.install()
    try:
        losses, found = train(backend)
    finally:
        ours.uninstall()
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6, msg=name)
    assert abs(expected[0] - expected[-1]) > 1e-3  # something was learnt


def test_no_logits_exist(installed):
    size, shape = 50_000, (2, 300)
    largest = largest_allocation(lambda: train("torch", vocab_size=size, shape=shape))
    assert largest < 0.1 * 600 * size * 4


# ---- verl's FSDP engine ----


def through_the_engine(remove_padding, temperature, llama, kind=None, **flags):
    """What verl's engine makes of a model and three sequences, by its own methods before and after the forward."""
    pytest.importorskip("peft")
    pytest.importorskip("codetiming")
    transformer_impl = pytest.importorskip("verl.workers.engine.fsdp.transformer_impl")
    import verl.utils.tensordict_utils as tu
    import verl.utils.torch_functional as verl_F

    engine = object.__new__(kind or transformer_impl.FSDPEngineWithLMHead)
    engine.pad_to_length, engine.pad_to_length_bucket, engine.use_ulysses_sp = remove_padding, 16, False
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = verl_F.entropy_from_logits
    ids = torch.nested.nested_tensor([row[:n] for row, n in zip(IDS, (20, 7, 13), strict=True)], layout=torch.jagged)
    positions = torch.nested.nested_tensor([torch.arange(n) for n in (20, 7, 13)], layout=torch.jagged)
    batch = tu.get_tensordict({"input_ids": ids, "position_ids": positions})
    temperature = {"temperature": temperature}
    if isinstance(temperature["temperature"], torch.Tensor):
        batch["temperature"] = temperature.pop("temperature")
    flags = {"calculate_entropy": True, "use_remove_padding": remove_padding} | temperature | flags
    tu.assign_non_tensor(batch, **flags)
    inputs, about = engine.prepare_model_inputs(batch)
    found = engine.prepare_model_outputs(llama(**inputs, use_cache=False), about, batch, None)
    # The label after a sequence's last token is whatever comes next, which padding changes.
    return {name: torch.cat([row[:-1] for row in value.unbind()]) for name, value in found.items()}


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("temperature", [0.8, PER_SAMPLE], ids=str)
@pytest.mark.parametrize("remove_padding", [True, False])
def test_the_engine(remove_padding, temperature, squares):
    """A temperature of each sample and sum_pi_squared with fused kernels, which verl's engine refuses by itself."""
    flags = {"calculate_sum_pi_squared": squares}
    plain, llama, forward = language_model(), language_model(), LlamaForCausalLM.forward
    expected = through_the_engine(remove_padding, temperature, plain, **flags)
    kinds = {"use_fused_kernels": True, "fused_kernels_backend": "torch"}
    monkey_patch.apply_monkey_patch(llama, use_remove_padding=False, **kinds)
    ours.install()
    try:
        found = through_the_engine(remove_padding, temperature, llama, use_fused_kernels=True, **flags)
    finally:
        ours.uninstall()
    if squares or isinstance(temperature, torch.Tensor):
        with pytest.raises((AssertionError, NotImplementedError)):
            through_the_engine(remove_padding, temperature, llama, use_fused_kernels=True, **flags)
    LlamaForCausalLM.forward = forward
    assert found.keys() == expected.keys() == {"log_probs", "entropy", *(["sum_pi_squared"] if squares else [])}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, msg=name)
    for result in (found, expected):
        sum(x.square().sum() for x in result.values()).backward()
    torch.testing.assert_close(llama.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_an_engine_with_a_forward_of_its_own_keeps_its_refusals(installed):
    """VeOmni's prepares other inputs for a fused forward that is not this library's."""
    for name in ("peft", "codetiming"):
        pytest.importorskip(name)
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    class Other(FSDPEngineWithLMHead):
        def prepare_model_inputs(self, micro_batch):
            return super().prepare_model_inputs(micro_batch)

    with pytest.raises(AssertionError, match="per sample temperature"):
        through_the_engine(True, PER_SAMPLE, None, kind=Other, use_fused_kernels=True)


# ---- install ----


def test_install_and_uninstall():
    for _ in range(2):
        ours.install(options=ChunkOptions(chunk_size=7))
        assert verl_functional.FusedLinearForPPO(impl_backend="torch").options.chunk_size == 7
        assert verl_kernel.linear_cross_entropy.func is ours.linear_cross_entropy
    ours.install()
    assert verl_functional.FusedLinearForPPO().options is None
    for _ in range(2):
        ours.uninstall()
        assert verl_functional.FusedLinearForPPO is THEIRS
        assert verl_kernel.linear_cross_entropy == THEIR_KERNEL


def test_modules_that_hold_the_kernel(monkeypatch):
    """verl's Megatron models import the function by its name, before or after."""
    holder = types.ModuleType("verl.models.mcore.model_forward_fused")
    holder.linear_cross_entropy = THEIR_KERNEL
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    ours.install()
    assert holder.linear_cross_entropy.func is ours.linear_cross_entropy
    ours.uninstall()
    assert holder.linear_cross_entropy == THEIR_KERNEL
    ours.install()
    later = types.ModuleType("verl.models.mcore.model_forward_1f1b_overlap")
    later.linear_cross_entropy = verl_kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, later.__name__, later)
    options = ChunkOptions(chunk_size=7)
    ours.install(options)
    assert later.linear_cross_entropy.keywords == {"options": options}
    ours.uninstall()
    assert later.linear_cross_entropy == THEIR_KERNEL


def test_verls_own_hook(tmp_path):
    """A module that verl imports while it is imported itself: its engine is under this library then, too."""
    for name in ("peft", "codetiming"):
        pytest.importorskip(name)
    (tmp_path / "use_chunked_ce.py").write_text("from chunked_ce.integrations import verl\n\nverl.install()\n")
    code = """
import verl
from chunked_ce.integrations import verl as ours
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
assert FSDPEngineWithLMHead in [owner for owner, *_ in ours._undo]
"""
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "use_chunked_ce", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


def test_an_unknown_verl(monkeypatch):
    class Changed(nn.Module):
        def forward(self, hidden_states, head):
            pass

    monkeypatch.setattr(verl_functional, "FusedLinearForPPO", Changed)
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.1: .*forward takes self, hidden_states, head instead of"):
        ours.install()
    monkeypatch.delattr(verl_functional, "FusedLinearForPPO")
    with pytest.raises(RuntimeError, match="has no FusedLinearForPPO"):
        ours.install()
    assert verl_kernel.linear_cross_entropy == THEIR_KERNEL


def test_bad_arguments():
    fused = ours.FusedLinearForPPO()
    with pytest.raises(ValueError, match="impl_backend must be 'torch' or 'liger', was 'cuda'"):
        ours.FusedLinearForPPO(impl_backend="cuda")
    with pytest.raises(ValueError, match="chunk_size"):
        ours.FusedLinearForPPO(chunk_size=0)
    with pytest.raises(TypeError, match="options"):
        ours.install(options={"chunk_size": 7})
    with pytest.raises(ValueError, match=r"input_ids must have the shape .* \(3, 20\), was \(3, 19\)"):
        fused(*MODEL, IDS[:, 1:])
    with pytest.raises(ValueError, match=r"temperature must be .*token \(3, 20\) or .*sample \(3,\), was \(2,\)"):
        fused(*MODEL, IDS, PER_SAMPLE[:2])
    with pytest.raises(ValueError, match="temperature"):
        fused(*MODEL, IDS, 0.0)
    with pytest.raises(ValueError, match="reduction must be 'none', 'sum' or 'mean', was 'max'"):
        ours.linear_cross_entropy(*MODEL, IDS, 1.0, "max")
