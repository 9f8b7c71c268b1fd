"""TRL's trainers on a small text, as `tests.packages.trainings` builds and compares them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.packages import trainings as t

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


ROWS, PROMPT, ANSWER = 12, 20, 40
TOKENS = 4 * (PROMPT + ANSWER)


def texts() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": t.passages(ROWS, PROMPT + ANSWER)})


def pairs() -> tuple[list[str], list[str]]:
    return t.passages(ROWS, PROMPT), [f" {text}" for text in t.passages(ROWS, ANSWER, shift=3000)]


def completions() -> datasets.Dataset:
    prompts, answers = pairs()
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": answers})


def chats() -> datasets.Dataset:
    rows = [_messages(prompt, answer) for prompt, answer in zip(*pairs(), strict=True)]
    return datasets.Dataset.from_dict({"messages": rows})


def _messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]


def preferences() -> datasets.Dataset:
    prompts, chosen = pairs()
    rejected = [f" {text}" for text in t.passages(ROWS, ANSWER, shift=5000)]
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def judged() -> datasets.Dataset:
    prompts, answers = pairs()
    labels = [bool(number % 2) for number in range(ROWS)]
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": answers, "label": labels})


def prompts() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": t.passages(ROWS, PROMPT)})


def share_of_even_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs from answer to answer."""
    return [sum(one % 2 == 0 for one in ids) / len(ids) for ids in completion_ids]


def saved(folder: Path, **changes: Any) -> Any:
    """A model that a trainer may load once more, as a reference."""
    model = t.new_model(**changes)
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")
    return model


def arguments(config: type, folder: Path, **settings: Any) -> Any:
    return config(output_dir=str(folder), **(t.ARGUMENTS | settings))


def build(
    trainer: type, config: type, folder: Path, rows: Any, *, model: Any = None, more: Any = None, **settings: Any
):
    """A trainer of ``rows`` (or of what they make), with ``more`` arguments, and ``settings`` of its ``config``."""
    return trainer(
        t.new_model() if model is None else model,
        args=arguments(config, folder, **settings),
        train_dataset=rows,
        processing_class=t.new_tokenizer(),
        **(more or {}),
    )


def output_of_logits(logits: torch.Tensor, labels: torch.Tensor, temperature: Any = 1.0) -> Any:
    """The reference: what TRL's fused head returns, from whole logits (batch, time, V) and labels (batch, time)."""
    from trl.trainer.utils import FusedCausalLMOutput

    labels, logits = labels[:, 1:], logits[:, :-1]
    temperature = temperature[:, 1:, None] if isinstance(temperature, torch.Tensor) else temperature
    logprobs = (logits.float() / temperature).log_softmax(-1)
    counted, words = labels != -100, labels.clamp(min=0).unsqueeze(-1)
    found = logprobs.gather(-1, words).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    is_top1 = (logprobs.argmax(-1, keepdim=True) == words).squeeze(-1) & counted
    loss = -found[counted].sum() / counted.sum().clamp(min=1)
    fields = {"log_probs": found.where(counted, 0), "entropy": entropy.where(counted, 0), "is_top1": is_top1}
    return FusedCausalLMOutput(loss=loss, **fields, label_mask=counted)


def add_whole_logits(model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple = ()):
    """`add_fused_lm_head` from whole logits, whatever is around the head."""
    forward = model.forward

    def fused(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        return output_of_logits(forward(*args, **kwargs).logits, labels, temperature)

    model.forward = fused
