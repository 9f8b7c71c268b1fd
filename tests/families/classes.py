"""The classes, and what is found of all of them."""

from __future__ import annotations

import multiprocessing
import re
import signal
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import transformers

from tests.families.steps import UNBUILT, Finding, examine

SECONDS = 240  # for one class
ENDINGS = (
    "ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining|LMHeadModel|WithLMHead|DoubleHeadsModel|MarianMTModel|"
    "BertGenerationDecoder|EncoderDecoderModel|2Text|SpeechToText|TextToText|ForBlockDiffusion|Omni_Reasoning_V3|"
    "Rag\\w+ForGeneration"
)


class TooSlow(BaseException):
    """No error of a model, which would be a finding."""


def names() -> list[str]:
    """The classes with a head of words: by the ends of their names, as Transformers chooses them."""
    return [name for name in dir(transformers) if re.search(f"({ENDINGS})$", name) and not name.startswith("Auto")]


def examine_all(classes: Iterable[str], processes: int) -> Iterator[Finding]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=quiet) as pool:
        yield from pool.map(examine_in_time, classes)


def quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def examine_in_time(name: str) -> Finding:
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return examine(name)
    except TooSlow:
        return Finding(name, UNBUILT, f"it takes more than {SECONDS} s")
    finally:
        signal.alarm(0)


def stop(*_: Any) -> None:
    raise TooSlow
