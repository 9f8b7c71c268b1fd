"""Transformers' `Trainer` with an `LMHead`: the loss curve of the plain model, in one process and in two."""

import logging
import traceback
import warnings

import pytest
import torch

from chunked_ce import ChunkOptions, LMHead
from tests.distributed.launch import run
from tests.integrations.training import largest_allocation

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

VOCAB, LENGTH, STEPS, ROWS = 512, 24, 3, 24

# What a training is given on top of `arguments`.
SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "label smoothing, accumulation": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "bf16, label smoothing": {"bf16": True, "label_smoothing_factor": 0.2},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "clipped": {"max_grad_norm": 0.01},
    "loss alone": {"prediction_loss_only": True},
}
RANKS = {
    "ranks": {"average_tokens_across_devices": True, "gradient_accumulation_steps": 2},
    "ranks, mean of means": {"average_tokens_across_devices": False},
    "ranks, label smoothing": {"label_smoothing_factor": 0.2},
    "ranks, unused parameters": {"ddp_find_unused_parameters": True, "label_smoothing_factor": 0.2},
    "zero3": {"deepspeed": True, "gradient_accumulation_steps": 2},
    "zero3, label smoothing": {"deepspeed": True, "label_smoothing_factor": 0.2},
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Rows(torch.utils.data.Dataset):
    """Sequences that begin with a prompt, whose length differs from row to row and does not count."""

    def __init__(self, rows=ROWS):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
        self.prompts = torch.randint(0, LENGTH - 4, (rows,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        labels = self.ids[row].clone()
        labels[: self.prompts[row]] = -100
        return {"input_ids": self.ids[row], "labels": labels}


def new_model():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCAB, initializer_range=0.2, tie_word_embeddings=True, **sizes)
    )


def new_trainer(folder, wrapped: bool, **settings):
    settings = dict(settings)
    if settings.pop("deepspeed", False):
        settings |= {"deepspeed": ZERO3, "accelerator_config": {"use_configured_state": True}}
        # Accelerate knows DeepSpeed on GPUs; on CPUs it would take every process for the only one.
        state = accelerate.PartialState(cpu=True)
        state.distributed_type = accelerate.DistributedType.DEEPSPEED
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu="deepspeed" not in settings,  # which takes DeepSpeed for a matter of GPUs
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        **settings,
    )
    model = new_model()
    if wrapped:
        LMHead.wrap(model, options=ChunkOptions(chunk_size=8))
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(4))


def curve(folder, wrapped: bool, ranks: int = 1, **settings) -> dict[str, list[float]]:
    """Losses and norms of gradients step by step, and the loss of an evaluation."""
    trainer = new_trainer(folder, wrapped, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyLogits")
        trainer.train()
        found = trainer.evaluate()["eval_loss"]
    assert trainer.args.world_size == ranks
    if "deepspeed" in settings:
        engine = trainer.accelerator.deepspeed_engine_wrapped.engine
        assert engine.zero_optimization_stage() == 3
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == STEPS and type(trainer.model.lm_head) is (LMHead if wrapped else torch.nn.Linear)
    return {
        "loss": [log["loss"] for log in logs],
        "norm": [float(log["grad_norm"]) for log in logs],
        "evaluation": [found],
    }


def assert_same_curve(ours, plain, low_precision=False):
    """The plain model's numbers to within rounding.

    In fp32 a loss near 6 and a norm are sums of about a thousand terms that round independently. In bf16 the
    plain logits are rounded to 2^-9 of themselves and these are not, so that a loss is as uncertain as one logit
    over the root of the number of tokens (at least 30).
    """
    bound = 2**-9 if low_precision else 1e-5
    for name, values in plain.items():
        assert ours[name] == pytest.approx(values, rel=bound), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name == "compiled")) for name in SETTINGS]
)
def test_one_process(name, tmp_path):
    ours, plain = (curve(tmp_path, wrapped, **SETTINGS[name]) for wrapped in (True, False))
    assert len(set(plain["norm"])) > 1  # the steps change something
    assert_same_curve(ours, plain, low_precision="bf16" in name)


def test_the_logits_never_exist(tmp_path):
    logits = 4 * 2 * LENGTH * VOCAB  # bytes
    settings = {"label_smoothing_factor": 0.2}  # taken from the logits outside of the model
    assert largest_allocation(new_trainer(tmp_path, False, **settings).train) >= logits
    assert largest_allocation(new_trainer(tmp_path, True, **settings).train) < logits / 2


def test_a_loss_of_ones_own(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][..., :-1, :].contiguous()
        count = torch.nn.CrossEntropyLoss(reduction="sum")
        return count(logits.view(-1, logits.size(-1)), labels[..., 1:].reshape(-1)) / num_items_in_batch

    losses = []
    for wrapped in (True, False):
        trainer = new_trainer(tmp_path, wrapped, gradient_accumulation_steps=2)
        trainer.compute_loss_func = loss
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_predictions_are_ordinary_tensors(tmp_path):
    ours, plain = (new_trainer(tmp_path, wrapped).predict(Rows(4)) for wrapped in (True, False))
    assert ours.predictions.shape == (4, LENGTH, VOCAB)
    assert (ours.predictions == plain.predictions).all()


# ---- evaluation ----


@pytest.mark.parametrize("settings", [{}, {"prediction_loss_only": True}, {"label_smoothing_factor": 0.2}])
def test_an_evaluation_forms_no_logits(tmp_path, monkeypatch, settings):
    """`Trainer` keeps the loss only where it has no `compute_metrics`."""
    monkeypatch.setitem(globals(), "VOCAB", 50_000)
    largest, losses = [], []
    for wrapped in (True, False):
        trainer = new_trainer(tmp_path, wrapped, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LazyLogits")
            largest.append(largest_allocation(lambda trainer=trainer: losses.append(trainer.evaluate()["eval_loss"])))
    logits = 4 * 2 * LENGTH * VOCAB
    assert largest[0] < 0.2 * logits and largest[1] >= logits  # chunks of 8 of 48 tokens
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("keeps", ["logits", "predictions"])
def test_metrics_see_the_logits_themselves(tmp_path, keeps):
    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    seen = []
    for wrapped in (True, False):
        trainer = new_trainer(tmp_path, wrapped)
        trainer.compute_metrics = metrics
        if keeps == "predictions":
            trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LazyLogits")
            trainer.evaluate()
    assert (seen[0] == seen[1]).all() and seen[0].shape[:2] == (4, LENGTH)
    trainer = new_trainer(tmp_path, True)
    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert dict(LMHead.report(trainer.model).heads[0].evaluation.plain) == {"in evaluation mode": 2}  # and no loss


# ---- two processes ----


def train_on_ranks(rank, world_size, folder):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this, for a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    found = {}
    for name, settings in RANKS.items():
        for wrapped in (True, False):
            accelerate.state.AcceleratorState._reset_state(
                reset_partial_state=True
            )  # or the first kind of training is every kind
            try:
                found[name, wrapped] = curve(folder, wrapped, world_size, **settings)
            except Exception:
                found[name, wrapped] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("trainer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "0")
        return run(train_on_ranks, 2, folder)


@pytest.mark.parametrize("name", RANKS)
def test_two_processes(on_ranks, name):
    for found in on_ranks:
        ours, plain = found[name, True], found[name, False]
        assert not isinstance(plain, str), plain
        assert not isinstance(ours, str), ours
        assert_same_curve(ours, plain, low_precision="bf16" in name)
