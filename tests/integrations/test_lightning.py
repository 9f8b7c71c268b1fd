"""Lightning and Accelerate: their loops need nothing."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chunked_ce import LazyLogits, LMHead

VOCAB, WIDTH, STEPS = 64, 8, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)).tanh())


def loss_of(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def new_models():
    torch.manual_seed(0)
    plain = Model()
    ours = copy.deepcopy(plain)
    LMHead.wrap(ours)
    return ours, plain


@pytest.fixture(autouse=True)
def nothing_computed():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyLogits")
        yield


def rows():
    return torch.utils.data.DataLoader(
        torch.randint(VOCAB, (4 * STEPS, 10), generator=torch.Generator().manual_seed(1)), batch_size=4
    )


def assert_same_parameters(ours, plain):
    for ours_now, plain_now in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours_now, plain_now)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses, self.kinds = model, {"train": [], "validate": []}, set()

        def training_step(self, ids, number):
            logits = self.model(ids)
            self.kinds.add(type(logits))
            loss = loss_of(logits, ids)
            self.log("loss", loss)
            self.losses["train"].append(loss.item())
            return loss

        def validation_step(self, ids, number):
            logits = self.model(ids)
            assert type(logits) is torch.Tensor
            self.losses["validate"].append(loss_of(logits.float(), ids).item())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    modules = []
    for model in new_models():
        module = Module(model)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            precision=precision,
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, rows(), rows())
        modules.append(module)
    ours, plain = modules
    assert ours.kinds == {LazyLogits} and plain.kinds == {torch.Tensor}
    bound = 2**-9 if precision == "bf16-mixed" else 1e-6  # of logits that are rounded, or not, before the loss
    for when, losses in plain.losses.items():
        assert len(losses) >= STEPS
        assert ours.losses[when] == pytest.approx(losses, rel=bound)
    if precision == "32-true":
        assert_same_parameters(ours.model, plain.model)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate")
    losses = []
    models = new_models()
    for model in models:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, rows())
        losses.append([])
        for ids in loader:
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared(ids), ids)  # outside of the forward, whose outputs are turned into fp32
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1].append(accelerator.gather(loss.detach()).mean().item())
        prepared.eval()
        assert type(prepared(ids)) is torch.Tensor
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[0] == pytest.approx(losses[1], rel=2**-9 if precision == "bf16" else 1e-6)
    if precision == "no":
        assert_same_parameters(*models)
