"""Trainings of language models by Transformers' `Trainer` and by Accelerate, with a sharded head or a plain one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import accelerate
import torch
import transformers
from torch import nn

from chunked_ce import ChunkOptions, LMHead

VOCAB, LENGTH, RANKS, STEPS = 101, 12, 2, 4  # 51 rows and 50


class Rows(torch.utils.data.Dataset):
    """Sequences that begin with a prompt, whose length differs from row to row and does not count."""

    def __init__(self, number: int):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, VOCAB, (number, LENGTH), generator=generator)
        self.prompts = torch.randint(0, LENGTH - 3, (number,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        labels = self.ids[row].clone()
        labels[: self.prompts[row]] = -100
        return {"input_ids": self.ids[row], "labels": labels}


class Training(NamedTuple):
    kind: str = "llama"
    tied: bool = True
    settings: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.kind, "tied" if self.tied else "untied", *(f"{k} {v}" for k, v in self.settings)])


ADAM = (("optim", "adamw_torch"), ("adam_epsilon", 0.01), ("learning_rate", 0.01))  # smooth near a gradient of 0
TRAININGS = [
    Training(settings=(("gradient_accumulation_steps", 3), ("max_grad_norm", 0.1))),
    Training(tied=False, settings=(*ADAM, ("max_grad_norm", 0.1), ("save_steps", 2))),
    Training("gpt2", settings=(*ADAM, ("save_steps", 2))),
    Training("gemma", settings=(("gradient_checkpointing", True), ("gradient_accumulation_steps", 2))),
]


def new_model(training: Training) -> nn.Module:
    torch.manual_seed(0)
    if training.kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, **sizes, **dropouts))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": VOCAB, "initializer_range": 0.2, "tie_word_embeddings": training.tied}
    if training.kind == "gemma":
        config = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=8, sliding_window=8)
        return transformers.Gemma3ForCausalLM(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


class Curve(NamedTuple):
    losses: list[float]
    norms: list[float]
    evaluation: float
    state: dict[str, torch.Tensor]


def run_trainer(training: Training, folder: Path, ranks: int, start: Path | None = None) -> Curve:
    """A training on ``ranks`` processes, of which this is one; the batch of a step is the same for any number.

    It goes on from the checkpoint ``start``.
    """
    settings = {"save_strategy": "no", "learning_rate": 0.1, "optim": "sgd"} | dict(training.settings)
    if "save_steps" in settings:
        settings["save_strategy"] = "steps"
    batch = 2 * RANKS // ranks
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        logging_steps=1,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    model = new_model(training)
    if ranks > 1:
        LMHead.shard(model, options=ChunkOptions(chunk_size=8))
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(64), eval_dataset=Rows(8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyLogits")
        trainer.train(resume_from_checkpoint=start)
        evaluation = trainer.evaluate()["eval_loss"]
    assert trainer.args.world_size == ranks
    trainer.save_model(str(folder / "final"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return Curve([log["loss"] for log in logs], [float(log["grad_norm"]) for log in logs], evaluation, state)


def run_accelerate(tied: bool, folder: Path, ranks: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """A loop with accumulation, clipping, and a checkpoint that is saved and loaded half-way."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = new_model(Training(tied=tied))
    if ranks > 1:
        LMHead.shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in Rows(32)]  # as many on each rank
    loader = torch.utils.data.DataLoader(data, batch_size=4 // ranks)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, norms = [], []
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(accelerator.gather(loss.detach()[None]).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            accelerator.save_state(str(folder))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            accelerator.load_state(str(folder))
    return losses, norms, accelerator.get_state_dict(model)


def run_peft(place: str, ranks: int) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """Some steps with adapters beside the head, or copies that are trained; the trained parameters in the end."""
    import peft

    model = new_model(Training(tied=place == "tied"))
    options = {"modules_to_save": ["lm_head"]} if place == "copy" else {}
    on_head = ["lm_head"] if place.startswith("on the head") else []
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", *on_head], init_lora_weights=False, **options)
    late = place in ("copy", "on the head, late")
    if ranks > 1 and not late:
        LMHead.shard(model)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    if ranks > 1 and late:
        LMHead.shard(model)
    engine = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.05)
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    losses = []
    for step in range(2):
        ids = Rows(8).ids[4 * step :][:4].view(ranks, -1, LENGTH)[rank]
        loss = engine(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    adapters = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    if on_head:
        model.merge_adapter()
        adapters["merged"] = model.state_dict()["base_model.model.lm_head.base_layer.weight"]
    return losses, adapters, [name for name, one in model.named_parameters() if one.requires_grad]


def trainable_tokens(ranks: int) -> list[str]:
    """What sharding a tied head says where PEFT trains some of its tokens, before and after."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    orders = (
        lambda model: LMHead.shard(peft.get_peft_model(model, config)),
        lambda model: peft.get_peft_model(LMHead.shard(model), config),
    )
    said = []
    for order in orders:
        try:
            order(new_model(Training()))
        except ValueError as error:
            said.append(str(error))
    return said
