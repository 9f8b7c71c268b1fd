"""A task whose answers can be checked: to say the line of a text that follows a given line."""

import subprocess
import sys
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor

from common.text_data import IGNORED, TEKKEN, read


def zen_of_python() -> str:
    """The twenty lines that ``import this`` prints."""
    return subprocess.run([sys.executable, "-c", "import this"], capture_output=True, text=True, check=True).stdout


class NextLines:
    """The first lines of a text as prompts (P,) of token ids, and the line after each of them as its answer (A,).

    Prompts are filled up on the left, answers end with Tekken's end of text and are filled up with `IGNORED`. Longer
    lines lose the first tokens of the prompt, or the last of the answer.

    Raises `OSError` for a file that cannot be read, `ValueError` for one that is not UTF-8 text or has too few lines.
    """

    def __init__(self, num_prompts: int, path: Path | None = None, prompt_length: int = 16, answer_length: int = 12):
        text = zen_of_python() if path is None else read(path)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) <= num_prompts:
            raise ValueError(f"the text has {len(lines)} lines that are not empty, too few for {num_prompts} prompts")
        tokenizer = Tekkenizer.from_file(TEKKEN)
        ids = [tokenizer.encode(line, bos=False, eos=False) for line in lines[: num_prompts + 1]]
        self.end = tokenizer.eos_id
        prompts = [[tokenizer.bos_id] * prompt_length + line for line in ids[:-1]]
        answers = [[*line, self.end][:answer_length] for line in ids[1:]]
        self.prompts = torch.tensor([prompt[-prompt_length:] for prompt in prompts])  # (lines, P)
        self.answers = torch.tensor([answer + [IGNORED] * (answer_length - len(answer)) for answer in answers])

    def __len__(self) -> int:
        return len(self.prompts)

    def examples(self, repeats: int, right: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Each prompt ``repeats`` times, (B, P), and answers (B, A): the right one with probability ``right``, else
        that of a random prompt."""
        prompts = torch.arange(len(self)).repeat(repeats)
        others = torch.randint(len(self), prompts.shape, generator=generator)
        answers = prompts.where(torch.rand(prompts.shape, generator=generator) < right, others)
        return self.prompts[prompts], self.answers[answers]

    def rewards(self, lines: Tensor, answers: Tensor) -> Tensor:
        """The share of each right answer that comes before the first mistake, (B,), for answers (B, A)."""
        right = self.answers[lines]
        counted = right != IGNORED
        return ((answers == right) & counted).cumprod(1).sum(1) / counted.sum(1)
