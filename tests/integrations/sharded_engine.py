"""What the ranks of `test_sharded_head_deepspeed.py` run: engines beside the rows of a sharded head."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce import LMHead, linear_loss
from chunked_ce.integrations import deepspeed_checkpoint as checkpoint
from chunked_ce.integrations.deepspeed import initialize, token_mean, uninstall
from chunked_ce.integrations.deepspeed_rows import STAND_IN, Rows, rows_of
from chunked_ce.objectives import PolicyGradient
from tests.distributed.token_training import BATCH, HIDDEN, VOCAB, State, Window, window
from tests.integrations.test_deepspeed import attempt, end, masters, sequence_parallel_ranks

RANKS = 2
LEARNING_RATE = 1000.0  # a step larger than the parameters, or their rounding would drown its error
MOST = 0.05  # the norm that clipped gradients have: they are larger in every case
SMOOTHING = 0.1


class Case(NamedTuple):
    stage: int
    tied: bool = True
    steps: int = 3
    data: str = "uneven"  # a key of COUNTED
    loss: str = "cross-entropy"  # or "policy"
    clip: bool = False
    dtype: str = "fp32"
    backward: str = "engine"  # or "loss", or "overflow": a step that is skipped comes first
    settings: str = ""  # a key of SETTINGS
    frozen: bool = False  # the head

    def __str__(self):
        words = ("tied" if self.tied else "untied", f"{self.steps} steps", self.data, self.loss, self.dtype)
        more = (*["clip"] * self.clip, self.backward, *filter(None, [self.settings]), *["frozen"] * self.frozen)
        return "-".join((f"zero{self.stage}", *words, *more))


# On top of the plain configuration; "zero" updates zero_optimization.
SETTINGS = {
    "": {},
    "sum": {"gradient_allreduce_op": "sum"},
    "unmanaged": {"managed_gradient_accumulation": False},
    "fp32 accumulation": {"data_types": {"grad_accum_dtype": "fp32"}},
    "offload": {"zero": {"offload_optimizer": {"device": "cpu"}}},
    "sequence": {},  # the ranks are sequence-parallel
    "no norm": {"zero": {"compute_grad_norm": False}},
}


class Model(nn.Module):
    """Returns the sum of the losses of its counted tokens."""

    def __init__(self, tied: bool, loss: str):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.loss = loss

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        if self.loss == "cross-entropy":
            logits = self.head(hidden).float() if hidden.dtype != torch.float64 else self.head(hidden)
            keywords = {"reduction": "sum", "label_smoothing": SMOOTHING}
            return F.cross_entropy(logits.view(-1, VOCAB), target.view(-1), **keywords)
        vocab = getattr(self.head, "vocab", None)
        keywords = {"linear_bias": self.head.bias, "reduction": "sum", "vocab": vocab} | policy_tensors(target)
        return linear_loss(PolicyGradient(entropy=0.01), hidden, self.head.weight, target, **keywords)


def policy_tensors(target: Tensor) -> dict[str, Tensor]:
    """Advantages of both signs, and old log-probabilities of which some are clipped."""
    place = torch.arange(target.numel()).view(target.shape)
    return {"advantage": torch.sin(place + 1.0), "old_logprob": -4.0 + torch.cos(place * 3.0)}


def configuration(case: Case) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": case.steps,
        "gradient_clipping": MOST if case.clip else 0.0,
        "bf16": {"enabled": case.dtype == "bf16", "check_grad_overflow": case.backward == "overflow"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
    }
    settings = dict(SETTINGS[case.settings])
    config["zero_optimization"].update(settings.pop("zero", {}))
    return config | settings


def new_engine(case: Case):
    model = new_model(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    parallel = {"mpu": sequence_parallel_ranks()} if case.settings == "sequence" else {}
    return deepspeed().initialize(model=model, optimizer=optimizer, config=configuration(case), **parallel)[0]


def deepspeed():
    import deepspeed

    return deepspeed


def new_model(case: Case) -> Model:
    model = Model(case.tied, case.loss)
    model.head.requires_grad_(not case.frozen)
    return LMHead.shard(model)


def train(engine, batches: Window, backward: str = "engine") -> float:
    """One window and its step; the mean loss over all ranks."""
    mean = token_mean(engine, [target for _, target in batches])
    sums = []
    for tokens, target in batches:
        sums.append(engine(tokens, target))
        if backward == "loss":
            mean(sums[-1]).backward()
        else:
            engine.backward(mean(sums[-1]))
        if engine.managed_gradient_accumulation():
            engine.step()
    if not engine.managed_gradient_accumulation():
        engine.step()
    return mean.report(sums).item()


def skip_a_step(engine, batches: Window) -> None:
    for tokens, target in batches:
        engine.backward(engine(tokens, target) * float("inf"))
        engine.step()
    assert not engine.was_step_applied() and engine.skipped_steps == 1


def whole_masters(engine) -> State:
    """The fp32 parameters that the optimizers step, whole."""
    rows = {
        place.name: one.sharding.whole(one.master, "a test's whole rows").float()
        for one in engine.separate_rows.all
        for place in one.places
    }
    engines = masters(engine).items()
    return {name: value for name, value in engines if not name.endswith(STAND_IN)} | rows


def one_step(case: Case, rank: int) -> tuple[State, float, float | None]:
    engine = new_engine(case)
    try:
        batches = window(case.data, rank, case.steps)
        if case.backward == "overflow":
            skip_a_step(engine, batches)
        loss = train(engine, batches, case.backward)
        norm = engine.get_global_grad_norm()
        return whole_masters(engine), loss, None if norm is None else float(norm)
    finally:
        end(engine)


def reference(case: Case, dtype: torch.dtype, start: torch.dtype) -> tuple[State, float, float]:
    """Parameters after the step, mean loss and norm of one process on the whole batch, by plain code in `dtype`."""
    model = Model(case.tied, case.loss).to(start).to(dtype)
    model.head.requires_grad_(not case.frozen)
    batches = [batch for rank in range(RANKS) for batch in window(case.data, rank, case.steps)]
    counted = sum((target != -100).sum() for _, target in batches).clamp(min=1)
    loss = 0.0
    for tokens, target in batches:
        mean = model(tokens, target) / counted
        mean.backward()
        loss += mean.item()
    wide = torch.promote_types(dtype, torch.float32)
    gradients = {n: p.grad.to(wide) if p.requires_grad else torch.zeros(()) for n, p in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    factor = (MOST / (norm + 1e-6)).clamp(max=1.0) if case.clip else 1.0
    state = {
        name: parameter.detach().to(wide) - LEARNING_RATE * factor * gradients[name]
        for name, parameter in model.named_parameters()
    }
    if case.tied:
        state["head.weight"] = state["embedding.weight"]
    return state, loss, norm.item()


# ---- several steps, checkpoints and state dicts ----

ADAM = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8}
DECAY = 0.3  # of the body; the embedding and the head are not decayed
WARMUP = 4  # steps
SAVED, ALL_STEPS = 2, 3


def new_adam_engine(case: Case, **settings):
    model = new_model(case)
    config = configuration(case) | settings
    config["optimizer"] = {"type": "AdamW", "params": ADAM | {"torch_adam": True}}
    schedule = {
        "warmup_min_lr": 0.002,
        "warmup_max_lr": ADAM["lr"],
        "warmup_num_steps": WARMUP,
        "warmup_type": "linear",
    }
    config["scheduler"] = {"type": "WarmupLR", "params": schedule}
    return deepspeed().initialize(model=model, model_parameters=adam_groups(model), config=config)[0]


def adam_groups(model: Model) -> list[dict]:
    body = list(model.body.parameters())
    others = [one for one in model.parameters() if not any(one is other for other in body)]
    return [{"params": body, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def batch_of_step(step: int, rank: int) -> Window:
    return window("uneven", rank, ALL_STEPS)[step : step + 1]


def adam_reference(case: Case, rates: list[float]) -> State:
    model = Model(case.tied, case.loss).double()
    optimizer = torch.optim.AdamW(adam_groups(model), **ADAM)
    for step in range(ALL_STEPS):
        batches = [batch for rank in range(RANKS) for batch in batch_of_step(step, rank)]
        counted = sum((target != -100).sum() for _, target in batches)
        optimizer.zero_grad()
        sum(model(*batch) for batch in batches).div(counted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
    state = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    return state


def resumed(case: Case, rank: int, folder: str) -> dict:
    """Masters after all steps, of an uninterrupted training and of one that went on from a checkpoint."""
    found = {"rates": []}
    engine = new_adam_engine(case)
    try:
        for step in range(ALL_STEPS):
            found["rates"].append(engine.get_lr()[0])
            train(engine, batch_of_step(step, rank))
            if step + 1 == SAVED:
                engine.save_checkpoint(folder)
                found["whole"] = {one.name: whole_state(one) for one in engine.separate_rows.all}
        found["uninterrupted"] = whole_masters(engine)
        found["state dict"] = whole_state_dict(case, engine)
        found["unwrap"] = attempt(LMHead.unwrap, engine.module)
    finally:
        end(engine)
    found["destroyed"] = {name: tuple(one.shape) for name, one in LMHead.unwrap(engine.module).named_parameters()}
    engine = new_adam_engine(case)
    try:
        engine.load_checkpoint(folder)
        for step in range(SAVED, ALL_STEPS):
            train(engine, batch_of_step(step, rank))
        found["resumed"] = whole_masters(engine)
    finally:
        end(engine)
    found["resharded"] = resharded(case, rank, Path(folder, f"global_step{SAVED}"))
    return found


def whole_state(one: Rows) -> State:
    """The rows of all ranks, of the fp32 copy and of the optimizer's state."""
    rows = {"values": one.master} | {name: it for name, it in one.state.items() if it.dim()}
    return {name: one.sharding.whole(it.detach(), "a test's whole rows") for name, it in rows.items()}


def whole_state_dict(case: Case, engine) -> State | None:
    return engine._zero3_consolidated_16bit_state_dict() if case.stage == 3 else engine.module_state_dict()


def resharded(case: Case, rank: int, folder: Path) -> dict[str, State]:
    """What a group of this rank alone reads of a checkpoint of two, and two ranks of that group's checkpoint."""
    alone = [dist.new_group([one]) for one in range(RANKS)][rank]
    rows = rows_of(LMHead.shard(Model(case.tied, case.loss), alone))
    checkpoint.load(rows, folder, with_optimizer=True)
    found = {"one": {one.name: whole_state(one) for one in rows}}
    copy = folder.with_name("of_one_rank")
    if rank == 0:
        checkpoint.save(rows, copy)
    dist.barrier()
    rows = rows_of(new_model(case))
    checkpoint.load(rows, copy, with_optimizer=True)
    return found | {"two": {one.name: whole_state(one) for one in rows}}


# ---- what is refused ----


def refusals(rank: int) -> dict[str, str]:
    import deepspeed

    case = Case(1)
    model = new_model(case)
    assert deepspeed.initialize is initialize
    uninstall()
    found = {"plain": attempt(deepspeed.initialize, model=model, config=configuration(case) | {"optimizer": SGD})}
    optimizer = torch.optim.SGD(Model(tied=True, loss="policy").parameters(), lr=1.0)
    found["before"] = attempt(initialize, model=model, optimizer=optimizer, config=configuration(case))
    groups = [dist.new_group([one]) for one in range(RANKS)]
    model = LMHead.shard(Model(tied=True, loss="policy"), groups[rank])
    found["group"] = attempt(initialize, model=model, config=configuration(case) | {"optimizer": SGD})
    assert "weight" in model.head._parameters and "weight" in model.embedding._parameters
    refused = configuration(case) | {"optimizer": SGD, "compile": {"deepcompile": True}}
    found["config"] = attempt(initialize, model=new_model(case), config=refused)
    # A model without a sharded head goes through unchanged.
    assert deepspeed.initialize is initialize
    engine = deepspeed.initialize(model=Model(True, "policy"), config=configuration(case) | {"optimizer": SGD})[0]
    assert type(engine) is deepspeed.DeepSpeedEngine
    end(engine)
    return found


SGD = {"type": "SGD", "params": {"lr": 1.0}}
