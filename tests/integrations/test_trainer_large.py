"""Transformers' `Trainer` with 50,000 words, in its settings and with PEFT: the plain training, without its logits."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chunked_ce import LMHead

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.packages import trainings as t

pytestmark = pytest.mark.thorough

LENGTH = 64
TOKENS = 4 * LENGTH
PACKAGE = f"Transformers {t.transformers.__version__}"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")

SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "label smoothing, accumulation": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "clipping": {"max_grad_norm": 0.1, "learning_rate": 2.0},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 0.01},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "evaluation, prediction_loss_only": {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True},
    "evaluation, label smoothing": {"eval_strategy": "steps", "eval_steps": 1, "label_smoothing_factor": 0.1},
}
ADAPTED = {
    "LoRA": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the head, dropout": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.2},
    "DoRA on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "rsLoRA on the head": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7, 11]},
}


def rows(number: int = 24) -> list[dict[str, list[int]]]:
    """Sequences that differ in length, whose padding does not count."""
    ids = t.new_tokenizer()(t.passages(number, length=LENGTH), padding="max_length", max_length=LENGTH)["input_ids"]
    return [{"input_ids": row, "labels": [token or -100 for token in row]} for row in ids]


def wrapped_or_not(model: Any, wrapped: bool, settings: dict[str, Any] | None = None) -> Any:
    if wrapped:
        return LMHead.wrap(model, options=t.OPTIONS)
    # In fp32 the sums of Transformers' own smoother move a parameter by up to 8e-6 of what float64 gives, ours by 1e-7.
    return model.double() if "label_smoothing_factor" in (settings or {}) else model


def new_trainer(model: Any, folder: Path, kind: str = "", more: dict[str, Any] | None = None, **settings: Any) -> Any:
    arguments = getattr(t.transformers, f"{kind}TrainingArguments")(str(folder), **(t.ARGUMENTS | settings))
    sets = {"train_dataset": rows(), "eval_dataset": rows(8)}
    return getattr(t.transformers, f"{kind}Trainer")(model, arguments, **sets, **(more or {}))


def compare(build: Callable[[bool, Path], Any], folder: Path, kind: str, setting: str) -> None:
    """`t.compare`, but for norms of gradients that are not both rounded to fp32."""
    if "smoothing" not in setting:
        t.compare(build, folder, TOKENS, t.Row(PACKAGE, kind, setting, "LMHead.wrap"))
        return
    plain, ours = (t.outcome(build, wrapped, folder / str(wrapped)) for wrapped in (False, True))
    for log in (*plain.logs, *ours.logs):
        log.pop("grad_norm", None)
    t.assert_same(ours, plain)
    t.assert_small(ours, TOKENS, plain=plain)
    assert not ours.warnings  # no row in the table: the plain training's largest tensor is in float64


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, tmp_path):
    def build(wrapped, folder):
        return new_trainer(wrapped_or_not(t.new_model(), wrapped, SETTINGS[name]), folder, **SETTINGS[name])

    compare(build, tmp_path, "Trainer", name)


@needs_peft
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name, tmp_path):
    import peft

    def build(wrapped, folder):
        model = wrapped_or_not(t.new_model(tie_word_embeddings="tokens" in name), wrapped)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **ADAPTED[name])
        rate = {"modules_to_save": 2.0, "DoRA on the head": 0.2}.get(name, 0.05)
        return new_trainer(peft.get_peft_model(model, config), folder, learning_rate=rate)

    compare(build, tmp_path, "Trainer", f"PEFT: {name}")


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=["", "label smoothing"])
def test_sequence_to_sequence(kind, settings, tmp_path):
    sizes = {
        "t5": {
            "d_model": t.WIDTH,
            "initializer_factor": 0.2,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
        }
    }
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes["bart"] = {**layers, **heads, "dropout": 0.0, "max_position_embeddings": LENGTH, "d_model": t.WIDTH}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}

    def build(wrapped, folder):
        torch.manual_seed(0)
        config = t.transformers.CONFIG_MAPPING[kind](vocab_size=t.VOCAB, **tokens, **sizes[kind])
        model = wrapped_or_not(t.transformers.AutoModelForSeq2SeqLM.from_config(config), wrapped, settings)
        for parameter in model.parameters():  # a bias of 0 without a gradient has nothing that its rounding is part of
            parameter.data += 0.01
        collator = t.transformers.DataCollatorForSeq2Seq(t.new_tokenizer(), model)  # it gives the decoder its input
        rate = {"t5": 5.0, "bart": 0.5}[kind]
        return new_trainer(model, folder, "Seq2Seq", {"data_collator": collator}, learning_rate=rate, **settings)

    compare(build, tmp_path, "Seq2SeqTrainer", f"{kind}, label smoothing" if settings else kind)


def test_bf16(tmp_path):
    def build(wrapped, folder):
        return new_trainer(wrapped_or_not(t.new_model(), wrapped), folder, bf16=True)

    plain, ours = (t.outcome(build, wrapped, tmp_path / str(wrapped)) for wrapped in (False, True))
    # The plain logits are rounded to 2^-9 of themselves, ours are not: a loss of 200 tokens is as uncertain as one.
    assert ours.losses == pytest.approx(plain.losses, rel=2**-9)
    t.assert_small(ours, TOKENS, plain=plain)
    assert not ours.warnings


def test_metrics_of_the_logits(tmp_path):
    """Whoever reads the logits of an evaluation gets them."""

    def correct(prediction):
        found, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((found == labels)[labels >= 0].mean()), "words": float(found.sum())}

    def build(wrapped, folder):
        reading = {"compute_metrics": correct, "preprocess_logits_for_metrics": lambda logits, _: logits.argmax(-1)}
        settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
        return new_trainer(wrapped_or_not(t.new_model(), wrapped), folder, more=reading, **settings)

    plain, ours = (t.outcome(build, wrapped, tmp_path / str(wrapped)) for wrapped in (False, True))
    assert sum("eval_words" in log for log in plain.logs) == t.STEPS
    t.assert_same(ours, plain)
    assert not ours.warnings
