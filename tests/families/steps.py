"""One class of Transformers: its tiny model, a batch for it, and its training step with an `LMHead` and without."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from chunked_ce import ChunkOptions, LMHead
from tests.families.configurations import WIDTH, small
from tests.families.exceptions import BATCHES, HEADLESS, OF_MODELS, ids, labels
from tests.integrations.training import Step, allocations, assert_same_step, training_step

CHUNKS = ChunkOptions(chunk_size=8)
LAZY, COMPUTED, PAST, REFUSED, HEADLESS_STATE, UNBUILT, WRONG = STATES = (
    "lazy",  # the logits never exist
    "computed",  # by an operation that is not followed
    "past the head",  # by the model's own code, which does not call the head
    "refused",  # by `LMHead.wrap`
    "no head",  # the class is trained by another loss
    "not built",
    "wrong",  # loss or gradients differ
)


class Finding(NamedTuple):
    name: str
    state: str
    detail: str = ""


def examine(name: str) -> Finding:
    """Build the class, and compare its training step with an `LMHead` with that without."""
    if name in HEADLESS:
        return Finding(name, HEADLESS_STATE, f"trained by {HEADLESS[name]}")
    try:
        plain = new_model(name)
        wrapped, double = copy.deepcopy(plain), copy.deepcopy(plain)
        batch = batch_for(plain)
        step = training_step(plain, lambda model: loss_of(model, batch))
        assert all(map(is_finite, (step.loss, *step.gradients.values()))), "loss or gradients are not finite"
    except Exception as error:
        return Finding(name, UNBUILT, said(error))
    try:
        LMHead.wrap(wrapped, options=CHUNKS)
    except ValueError as error:
        return Finding(name, REFUSED, said(error))
    try:
        return compared(name, wrapped, double, batch, step)
    except Exception as error:
        return Finding(name, WRONG, said(error))


def compared(name: str, wrapped: nn.Module, double: nn.Module, batch: dict[str, Any], plain: Step) -> Finding:
    """Raises if the step of ``wrapped`` is another than ``plain``."""

    def step() -> Step:
        return training_step(wrapped, lambda model: loss_of(model, batch))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = step()
    exact = exact_step(double, batch)
    if exact is None:
        assert_close(ours, plain)
    else:
        assert_same_step(ours, plain, exact, most_roundings=16)  # the largest error of some 10,000 gradients
    told = [str(one.message) for one in caught if re.search("LazyLogits|LMHead", str(one.message))]
    if told:
        operation = re.match("LazyLogits does not follow (.*?): ", told[0])
        return Finding(name, COMPUTED, f"by `{operation[1]}`" if operation else told[0])
    head = next(module for module in wrapped.modules() if isinstance(module, LMHead))
    if most_rows(head.out_features, step) > 2 * WIDTH:  # an embedding of that many words is as large
        return Finding(name, PAST, "its code forms logits")
    return Finding(name, LAZY, "float32 only" if exact is None else "")


def new_model(name: str) -> nn.Module:
    cls = getattr(transformers, name)
    config = small(cls.config_class, **OF_MODELS.get(name, {}))
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for field, value in {"decoder_start_token_id": 1, "pad_token_id": 0}.items():
            if part is not None and getattr(part, field, None) is None:
                setattr(part, field, value)
    torch.manual_seed(0)
    return cls._from_config(config, experts_implementation="eager").train()


def batch_for(model: nn.Module) -> dict[str, Any]:
    """What the forward of the model needs."""
    torch.manual_seed(2)
    given = BATCHES.get(type(model).__name__, lambda _: {})(model.config)
    usual = {"input_ids": ids(), "labels": labels()}
    taken = inspect.signature(model.forward).parameters
    usual = {name: value for name, value in usual.items() if name in taken}
    return {name: value for name, value in (usual | given).items() if value is not None}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output = model(**batch)
    if getattr(output, "loss", None) is not None:
        return output.loss.sum()  # it is one for each sequence in some
    logits = output.logits.flatten(0, -2)
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def exact_step(double: nn.Module, batch: dict[str, Any]) -> Step | None:
    """The step in float64; None if the model's code casts to float32."""
    batch = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    try:
        return training_step(double.double(), lambda model: loss_of(model, batch))
    except (RuntimeError, ValueError, TypeError):
        return None


def assert_close(ours: Step, plain: Step) -> None:
    """The same step but for a few roundings of float32."""
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-6, atol=0)
    largest = max(gradient.abs().max().item() for gradient in plain.gradients.values())
    torch.testing.assert_close(ours.gradients, plain.gradients, rtol=0, atol=1e-6 * largest)


def most_rows(words: int, step: Callable[[], object]) -> int:
    """The rows of the largest tensor (n, ``words``) of float32 that the step allocates."""
    return max((size // (4 * words) for size in allocations(step) if size % (4 * words) == 0), default=0)


def is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
