"""Real text as token ids, and batches that depend only on the seed and the step."""

import os
import sysconfig
import zlib
from pathlib import Path

import mistral_common
import numpy as np
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"  # 131,072 entries
IGNORED = -100


def load_tokens(paths: list[Path] | None = None) -> np.ndarray:
    """Tekken's token ids, int32, for the given text files or for `python_texts()`.

    Raises `OSError` for a file that cannot be read, `ValueError` for one that is not UTF-8 text.
    """
    texts = python_texts() if paths is None else [read(path) for path in paths]
    if os.environ.get("RANK", "0") == "0":
        print(f"Tokenizing {sum(map(len, texts)):,} characters of text", flush=True)
    tokenizer = Tekkenizer.from_file(TEKKEN)
    ids = [np.array(tokenizer.encode(text, bos=True, eos=True), dtype=np.int32) for text in texts]
    return np.concatenate(ids)


def python_texts() -> list[str]:
    """Text that comes with Python: its language reference, then the standard library's sources."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text("utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions lack it
        return sources
    return [*topics.values(), *sources]


def read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


class TextBatches:
    """Random windows of the text, `micro_batches * ranks * batch` per step.

    Windows depend only on the seed and the step, so a resumed run sees the same windows as an uninterrupted one,
    and one process with two micro-batches sees the same as two processes with one each. With `mask_prompt`, the
    targets of a first part of each window, of random length, are `IGNORED`.

    Raises `ValueError` if the text is shorter than one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,  # (length,)
        context: int,
        seed: int = 0,
        mask_prompt: bool = False,
    ):
        if len(tokens) <= context:
            raise ValueError(f"the text has {len(tokens)} tokens, too few for a context of {context}")
        self.tokens, self.context, self.seed, self.mask_prompt = tokens, context, seed, mask_prompt

    def fingerprint(self) -> str:
        return f"{len(self.tokens):,} tokens, crc32 {zlib.crc32(self.tokens):08x}"

    def step(
        self, step: int, *, micro_batches: int, batch: int, rank: int = 0, ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets for one optimizer step, each (micro_batches, batch, context)."""
        random = np.random.default_rng([self.seed, step])
        shape = (micro_batches, ranks, batch)
        starts = random.integers(len(self.tokens) - self.context, size=shape)[:, rank]
        prompts = random.integers(self.context, size=shape)[:, rank]

        windows = self.tokens[starts[..., None] + np.arange(self.context + 1)].astype(np.int64)
        inputs, targets = windows[..., :-1].copy(), windows[..., 1:].copy()
        if self.mask_prompt:
            targets[np.arange(self.context) < prompts[..., None]] = IGNORED
        return torch.from_numpy(inputs), torch.from_numpy(targets)
