"""torchtitan's own trainer on CPUs: a small model, a few steps, several losses.

torchtitan takes CUDA's module for the device; `use_cpus` puts a few constants in its place.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

SEQ, BATCH, VOCAB = 16, 2, 96


def use_cpus():
    """Before torchtitan's modules take the device by its name."""
    from torchtitan.tools import utils

    def nothing(*_args):
        return None

    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        set_device=nothing,
        current_device=lambda: 0,
        device_count=lambda: 1,
        synchronize=nothing,
        get_device_name=lambda *_: "cpu",
        get_device_properties=lambda *_: SimpleNamespace(total_memory=1 << 30),
        memory_stats=lambda *_: {},
        reset_peak_memory_stats=nothing,
        empty_cache=nothing,
    )
    utils.get_local_device = lambda: torch.device("cpu")

    from torchtitan.distributed import fsdp

    def sum_gradients(model):
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other way not to divide

    fsdp.disable_fsdp_gradient_division = sum_gradients


def _parts():
    """Classes that torchtitan's configuration needs, made once its modules know the device."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer

    class Tokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, **_others):
            super().__init__()

        def encode(self, *_args, **_kwargs):
            return []

        def decode(self, *_args, **_kwargs):
            return ""

        def get_vocab_size(self):
            return VOCAB

    class Data(BaseDataLoader):
        """Two documents to a sequence; a third of the labels is ignored, more of them on some ranks."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config, *, dp_rank=0, seq_len=SEQ, local_batch_size=BATCH, **_others):
            self.rank, self.shape = dp_rank, (local_batch_size, seq_len)

        def __iter__(self):
            g = torch.Generator().manual_seed(17 + self.rank)
            while True:
                ids = torch.randint(VOCAB, (self.shape[0], self.shape[1] + 1), generator=g)
                ids[:, 1:] = torch.where(
                    torch.rand(self.shape, generator=g) < 0.7, (ids[:, :-1] * 3 + 1) % VOCAB, ids[:, 1:]
                )
                labels = ids[:, 1:].clone()
                labels[torch.rand(self.shape, generator=g) < 0.3 * (1 + self.rank)] = -100
                start = self.shape[1] // 2 - 3
                positions = torch.arange(self.shape[1]).repeat(self.shape[0], 1)
                positions[:, start:] -= start
                yield {"input": ids[:, :-1].clone(), "positions": positions}, labels

        def state_dict(self):
            return {}

        def load_state_dict(self, _state):
            pass

    return Tokenizer, Data


def small_model(num_mtp_layers=0, tied=False):
    """torchtitan's debug model of Llama 3, or of DeepSeek V3 with multi-token prediction, made smaller and dense."""
    from torchtitan.models import deepseek_v3, llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    if num_mtp_layers:
        spec = deepseek_v3.model_registry("debugmodel", num_mtp_layers=num_mtp_layers)
        spec.post_optimizer_build_fn = None  # which balances experts
        for layer in (*spec.model.layers, *spec.model.mtp_layers):
            layer.moe, layer.feed_forward = None, deepcopy(spec.model.layers[0].feed_forward)
    else:
        spec = llama3.model_registry("debugmodel")
    config = spec.model
    del config.layers[2:]
    for layer in (*config.layers, *getattr(config, "mtp_layers", [])):
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.vocab_size = config.tok_embeddings.num_embeddings = config.lm_head.out_features = VOCAB
    config.enable_weight_tying = tied
    return spec


def trainer_of(
    loss, *, model=None, parallelism=None, compile_loss=False, typechecking=False, accumulation=1, dtype="float32"
):
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
    from torchtitan.config import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    tokenizer, data = _parts()
    # torchtitan knows Adam's kind only, which magnifies roundings of small gradients.
    OptimizersContainer._resolve_optimizer_factory = staticmethod(lambda _name: torch.optim.SGD)
    sgd = ParamGroupConfig(pattern=r".*", optimizer_name="SGD", optimizer_kwargs={"lr": 0.5})
    config = Trainer.Config(
        loss=loss,
        model_spec=small_model() if model is None else model,
        tokenizer=tokenizer.Config(),
        dataloader=data.Config(),
        optimizer=OptimizersContainer.Config(param_groups=[sgd], implementation="for-loop"),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(
            local_batch_size=BATCH,
            global_batch_size=accumulation * BATCH * dist.get_world_size() if accumulation > 1 else -1,
            seq_len=SEQ,
            steps=3,
            disable_cuda_graphs=True,
            mixed_precision_param=dtype,
        ),
        parallelism=ParallelismConfig(**(parallelism or {})),
        activation_checkpoint=None,
        compile=CompileConfig(enable=compile_loss, components=["loss"], backend="aot_eager"),
        checkpoint=CheckpointManager.Config(enable=False),
        debug=DebugConfig(seed=3, spmd_typechecking=typechecking),
    )
    return config.build()


def train(trainer, steps=3):
    """Losses of some steps, and the parameters afterwards, whole."""
    losses = []
    trainer.metrics_processor.log = lambda step, loss, *_args, **_kwargs: losses.append(loss)
    trainer.metrics_processor.should_log = lambda _step: True
    batches = trainer.batch_generator(trainer.dataloader)
    for _ in range(steps):
        trainer.step += 1
        trainer.train_step(batches)
    whole = {}
    for name, parameter in trainer.model_parts[0].named_parameters():
        parameter = parameter.detach()
        whole[name] = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()
    return losses, whole


def losses_by_name(num_mtp_layers):
    """torchtitan's plain and chunked losses, and ours."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.models.deepseek_v3.mtp import MTPLoss

    from chunked_ce.integrations.torchtitan import ChunkedCrossEntropyLoss

    if num_mtp_layers:
        return {"plain": MTPLoss.Config(global_vocab_size=VOCAB), "ours": ChunkedCrossEntropyLoss.Config()}
    plain = CrossEntropyLoss.Config(global_vocab_size=VOCAB)
    return {
        "plain": plain,
        "chunked": ChunkedLossWrapper.Config(num_chunks=4, loss_fn=plain),
        "ours": ChunkedCrossEntropyLoss.Config(),
    }


def compare(rank, world_size, settings):
    """For each of ``settings``: losses and parameters of three steps with each loss."""
    use_cpus()
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the process group
    results = []
    for setting in settings:
        setting = dict(setting)
        depths, tied = setting.pop("mtp", 0), setting.pop("tied", False)
        found = {}
        for name, loss in losses_by_name(depths).items():
            found[name] = train(trainer_of(loss, model=small_model(depths, tied), **setting))
        results.append(found)
    return results


def by_hand(rank, world_size):
    """The backends that torch 2.13 has not all of FSDP2 for, without it: loss and gradients of one call each.

    For each: torchtitan's loss, its gradients, ours, our gradients; the gradients whole.
    """
    use_cpus()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.distributed.spmd_types import set_current_spmd_mesh
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.linear import Linear

    from chunked_ce.integrations.torchtitan import ChunkedCrossEntropyLoss

    g = torch.Generator().manual_seed(4)
    size, width = VOCAB + 1, 24  # which ranks share unevenly
    hidden, weight = torch.randn(2, SEQ, width, generator=g), torch.randn(size, width, generator=g) / 3
    labels = torch.randint(size, (2, SEQ), generator=g)
    labels[0, 3:9] = -100
    tokens = torch.tensor(int((labels != -100).sum()))
    found = {}

    def both(name, hidden, weight, labels, forward, total):
        results = []
        for is_ours in (False, True):
            head = Linear.Config(in_features=width, out_features=size).build()
            head.weight = torch.nn.Parameter(weight.detach().clone())
            states = hidden.detach().clone().requires_grad_()
            loss_fn = (
                ChunkedCrossEntropyLoss.Config() if is_ours else CrossEntropyLoss.Config(global_vocab_size=size)
            ).build()
            if is_ours:
                loss_fn.set_lm_head(head)
            loss, metrics = loss_fn(states if is_ours else forward(head, states), labels, tokens)
            loss.backward()
            assert metrics == {}
            kinds = [type(x) for x in (loss, states.grad, head.weight.grad)]
            results.append((kinds, *(total(x) for x in (loss.detach(), states.grad, head.weight.grad))))
        found[name] = results

    set_spmd_backend("full_dtensor")
    for name, shape in {"full, data": (world_size, 1), "full, tensor": (1, world_size)}.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_shard", "tp"))
        tokens_at, rows_at = (Shard(0), Replicate()), (Replicate(), Shard(0))
        arguments = [
            distribute_tensor(x, mesh, at) for x, at in ((hidden, tokens_at), (weight, rows_at), (labels, tokens_at))
        ]
        both(name, *arguments, lambda head, states: head(states), lambda x: x.full_tensor())

    set_spmd_backend("spmd_types")
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    rows = weight.chunk(world_size)[rank]

    def summed(x):
        """The gradient of hidden states, of which each rank has a part; others as they are."""
        if x.shape == hidden.shape:
            dist.all_reduce(x)
        return x

    with set_current_spmd_mesh(mesh):
        both("spmd_types, tensor", hidden, rows, labels, lambda head, states: head(states), summed)
    return found


def head_after_its_gradient(rank, world_size):
    """What FSDP2 has made of the head when the backward goes on below it: the class and the gradient of its weight."""
    use_cpus()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torchtitan.models.common.linear import Linear

    from chunked_ce.integrations.torchtitan import ChunkedCrossEntropyLoss

    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    model = torch.nn.Module()
    model.body = torch.nn.Linear(8, 8)
    model.head = Linear.Config(in_features=8, out_features=VOCAB).build()
    model.forward = lambda x: model.body(x)
    for module in (model.body, model.head, model):
        fully_shard(module, mesh=mesh)
    loss_fn = ChunkedCrossEntropyLoss.Config().build()
    loss_fn.set_lm_head(model.head)
    found = []

    def look(_gradient):
        weight = model.head.weight
        found.append((type(weight).__name__, weight.grad is not None))

    hidden = model(torch.randn(2, SEQ, 8))
    hidden.register_hook(look)
    loss_fn(hidden, torch.randint(VOCAB, (2, SEQ)), torch.tensor(2 * SEQ))[0].backward()
    return found[0]
