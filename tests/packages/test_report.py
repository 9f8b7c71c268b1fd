"""A wrap that TRL's fused head or Liger's patch goes around is told, once."""

import contextlib
import warnings

import pytest
import torch

from chunked_ce import LMHead
from tests.packages.trainings import ARGUMENTS, new_model, new_tokenizer, passages


def said_by(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if "LMHead has no effect here" in str(one.message)]


def test_trl_has_a_head_of_its_own(tmp_path):
    pytest.importorskip("trl", minversion="1.15")
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        LMHead.wrap(new_model(), z_loss=0.1),
        trl.SFTConfig(output_dir=str(tmp_path), eval_strategy="no", **ARGUMENTS),
        train_dataset=datasets.Dataset.from_dict({"text": passages(8)}),
        processing_class=new_tokenizer(),
    )
    (message,) = said_by(trainer.train)
    assert "trl.trainer.utils" in message and "chunked_ce.integrations.trl.install()" in message
    (head,) = LMHead.report(trainer.model).heads
    assert head.training.calls == 0 and "trl.trainer.utils._fused_forward" in head.training.bypasses


def test_liger_patches_the_forward():
    liger = pytest.importorskip("liger_kernel.transformers")
    model, ids = LMHead.wrap(new_model()), torch.arange(40).view(2, 20)
    kernels = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
    liger.apply_liger_kernel_to_llama(model=model, cross_entropy=False, **kernels)

    def train():
        for _ in range(2):
            with contextlib.suppress(Exception):  # its kernels want a GPU
                model(ids, labels=ids).loss.backward()

    (message,) = said_by(train)
    assert "liger_kernel.transformers.model" in message and "use_liger_kernel=False" in message
