"""Three steps of somebody else's trainer with and without this library: the same losses, parameters and logs?

A test hands `compare` a function that builds a trainer. Text, tokenizer and model here need no download.
"""

import json
import math
import re
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from chunked_ce import ChunkOptions

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

VOCAB, WIDTH, STEPS = 50_000, 16, 3
FP32_TOLERANCE = 1e-6
# Chunks of 16 tokens: far below a tenth of the logits of some 400 tokens.
OPTIONS = ChunkOptions(memory_budget=16 * VOCAB * 4)
RESULTS = Path(__file__).with_name("results.json")

# What all trainers are given: on the CPU, in fp32, nothing that hides the size of a gradient.
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "seed": 7,
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
# Logs that tell the machine's speed, or the harness' own.
TIMES = re.compile("time|per_second|runtime|flops|memory|epoch|mfu")


class Row(NamedTuple):
    """The names of a row of the table in docs/trainers.md."""

    package: str  # "TRL 1.16.0"
    trainer: str  # "SFTTrainer"
    setting: str  # "packing"
    by: str  # "LMHead.wrap"


class Outcome(NamedTuple):
    """What three steps of a trainer left behind."""

    losses: list[float]  # one for each micro-batch, as `training_step` returns them
    before: dict[str, Tensor]  # the parameters that are trained
    parameters: dict[str, Tensor]
    logs: list[dict[str, float]]  # numbers that the trainer logs, without times
    largest: int  # bytes of the largest allocation while it trains
    warnings: list[str]  # of chunked_ce


def words() -> list[str]:
    """Words of a real text, in its order."""
    library = Path(sysconfig.get_path("stdlib"))
    return re.findall(r"\w+|[^\w\s]", (library / "argparse.py").read_text("utf-8"))


def new_tokenizer() -> Any:
    """One token for each word of the text, filled up to `VOCAB` so that every id has a word."""
    known = [*SPECIAL, *dict.fromkeys([*words(), "system", "user", "assistant", ":"])]
    known += [f"word{number}" for number in range(VOCAB - len(known))]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT
    return fast


def passages(number: int, length: int = 100, shift: int = 0) -> list[str]:
    """Pieces of the text, of ``length`` words down to two thirds of it."""
    text = words()[shift:]
    sizes = [length - index % 3 * length // 9 for index in range(number)]
    return [" ".join(text[index * length : index * length + size]) for index, size in enumerate(sizes)]


def new_model(**changes: Any) -> Any:
    """A Llama whose logits differ from word to word enough to tell a wrong gradient."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {"vocab_size": VOCAB, "initializer_range": 0.2, "tie_word_embeddings": False, **sizes, **special}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))


def outcome(build: Callable[[bool, Path], Any], wrapped: bool, folder: Path) -> Outcome:
    """Train what ``build(wrapped, folder)`` returns; its arguments say for how many steps."""
    transformers.set_seed(7)
    trainer = build(wrapped, folder)
    # A step of SGD moves a parameter by its gradient: nothing evens out a wrong one.
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    losses: list[float] = []
    its_step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = its_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    transformers.set_seed(7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            trainer.train()
    events = profile.profiler.kineto_results.events()
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name in before}
    ours = [str(w.message) for w in caught if re.search("LazyLogits|LMHead|chunked_ce", f"{w.message} {w.filename}")]
    return Outcome(
        losses,
        before,
        after,
        [_numbers(log) for log in trainer.state.log_history if "train_runtime" not in log],
        max(event.nbytes() for event in events if event.name() == "[memory]"),
        ours,
    )


def compare(
    build: Callable[[bool, Path], Any], folder: Path, tokens: int, row: Row | None = None, scale: float = 1.0
) -> tuple[Outcome, Outcome]:
    """Train with and without; fail if they differ, if a tensor is large, or if this library warned.

    Args:
        build: makes a trainer from ``(wrapped, folder)``.
        tokens: those of a batch, for `assert_small`.
        row: where the table in the docs has the result, if it has.
        scale: as in `assert_same`.
    """
    plain = outcome(build, False, folder / "plain")
    ours = outcome(build, True, folder / "ours")
    assert_same(ours, plain, scale=scale)
    assert_small(ours, tokens, plain=plain)
    assert not ours.warnings
    if row is not None:
        record(ours, plain, tokens, row)
    return ours, plain


def assert_same(ours: Outcome, plain: Outcome, tolerance: float = FP32_TOLERANCE, scale: float = 1.0) -> None:
    """Losses, parameters and logs are those of the plain training.

    Args:
        tolerance: relative to a loss, or to ``scale`` where that is larger; to the largest entry of a parameter; ten
            times as much relative to the change of all parameters together, and for logs.
        scale: the size of the terms that a loss adds up.
    """
    assert len(ours.losses) == len(plain.losses) >= STEPS and all(map(math.isfinite, plain.losses))
    for step, (mine, other) in enumerate(zip(ours.losses, plain.losses, strict=True)):
        assert abs(mine - other) <= tolerance * max(abs(other), scale), f"loss {step}: {mine!r}, plain {other!r}"

    assert ours.parameters.keys() == plain.parameters.keys() and plain.parameters
    difference = change = size = 0.0
    for name, other in plain.parameters.items():
        error = ours.parameters[name].double() - other.double()
        allowed = tolerance * other.abs().max().item()
        assert error.abs().max() <= allowed, f"{name} is off by {error.abs().max():.3g}, allowed {allowed:.3g}"
        difference += error.square().sum().item()
        change += (other.double() - plain.before[name]).square().sum().item()
        size += other.double().square().sum().item()
    assert math.sqrt(change) >= 1000 * tolerance * math.sqrt(size), "the training hardly moves the parameters"
    relative = math.sqrt(difference / change)
    assert relative <= 10 * tolerance, f"the change of the parameters differs by {relative:.3g} of its norm"

    for step, (mine, other) in enumerate(zip(ours.logs, plain.logs, strict=True)):
        assert mine.keys() == other.keys(), f"logs {step}: {mine.keys() ^ other.keys()}"
        for name, value in other.items():
            allowed = 10 * tolerance * max(abs(value), scale)
            assert abs(mine[name] - value) <= allowed, f"log {step}: {name} is {mine[name]!r}, plain {value!r}"


def assert_small(ours: Outcome, tokens: int, vocab: int = VOCAB, plain: Outcome | None = None) -> None:
    """No tensor is a tenth of the logits of a batch in fp32; of the plain training's (if given), one is larger."""
    limit = 0.1 * tokens * vocab * 4
    assert ours.largest < limit, f"the largest tensor has {ours.largest / limit / 10:.3f} of N V"
    if plain is not None:
        assert ours.largest < plain.largest, "the plain training has no larger tensor: this says nothing"


def record(ours: Outcome, plain: Outcome, tokens: int, row: Row) -> None:
    """Keep a row for the table, which `python -m tests.packages.table` makes."""
    known = {tuple(other[name] for name in Row._fields): other for other in recorded()}
    sizes = {name: round(its.largest / (tokens * VOCAB * 4), 3) for name, its in (("ours", ours), ("plain", plain))}
    known[row] = row._asdict() | sizes
    RESULTS.write_text(json.dumps([known[names] for names in sorted(known)], indent=1) + "\n")


def recorded() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []


def _numbers(log: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in log.items() if not TIMES.search(name) and value is not None}
