"""Trainings by Accelerate and by Transformers' `Trainer` with FSDP2 and a sharded head.

Both leave FSDP2 to accelerators: on a CPU, their own code for it runs once the state says that it is in use.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from chunked_ce import LMHead
from tests.integrations.sharded_trainings import RANKS, Curve, Rows, Training, new_model


def use_fsdp2(accelerator: accelerate.Accelerator, **keywords) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **keywords)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    # Each new state of the whole program's copies that of the process.
    for shared in (accelerator.state._shared_state, accelerate.state.PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP


def shard(model: torch.nn.Module) -> torch.nn.Module:
    return LMHead.shard(model, init_device_mesh("cpu", (RANKS,)))


def loaded_with_accelerate(tied: bool, mixed_precision: str, is_ram_efficient: bool, ranks: int) -> None:
    """Accelerate casts parameters to fp32, or distributes those of rank 0, before they are trained."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    use_fsdp2(accelerator, cpu_ram_efficient_loading=is_ram_efficient)
    dtype = torch.float32 if mixed_precision == "no" else torch.bfloat16
    model = new_model(Training(tied=tied)).to(dtype)
    expected = {name: value.float() for name, value in model.state_dict().items()}
    if is_ram_efficient and accelerator.process_index:
        for parameter in model.parameters():
            parameter.data.zero_()
    shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = Rows(4).ids[accelerator.process_index :]
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head is embedding) == tied and isinstance(head, DTensor) and head.grad.dtype == torch.float32
    assert any(head is one for one in optimizer.param_groups[0]["params"])
    state = accelerator.get_state_dict(model)  # on the main process
    assert len(state) == (0 if accelerator.process_index else len(expected))
    for name, value in state.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name


class Trainer(transformers.Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.world_size > 1:
            use_fsdp2(self.accelerator, state_dict_type="SHARDED_STATE_DICT")
            self.is_fsdp_enabled = True


def run_trainer_with_fsdp(training: Training, folder: Path, ranks: int, start: Path | None = None) -> Curve:
    """As `run_trainer`, with FSDP2 on several ranks."""
    batch = 2 * RANKS // ranks
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1, "optim": "sgd", "max_steps": 4}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch,
        logging_steps=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.1,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    model = new_model(training)
    if ranks > 1:
        shard(model)
    trainer = Trainer(model, arguments, train_dataset=Rows(64))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyLogits")
        trainer.train(resume_from_checkpoint=start)
    if ranks > 1:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type(
            "FULL_STATE_DICT"
        )  # the model itself, not a checkpoint
    trainer.save_model(str(folder / "final"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    state = trainer.accelerator.get_state_dict(trainer.model)
    return Curve([log["loss"] for log in logs], [float(log["grad_norm"]) for log in logs], 0.0, state)
