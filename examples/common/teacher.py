"""What a teacher says of each token: its hidden states, or its K likeliest words."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model import Transformer
from common.text_data import IGNORED, TextBatches

CHUNK = 256  # tokens whose logits exist at a time


class HiddenStates:
    """Batches with the teacher's hidden states, (micro_batches, B, T, D), computed when they are asked for."""

    def __init__(self, batches: TextBatches, teacher: Transformer):
        self.batches, self.teacher, self.context = batches, teacher, batches.context
        self.device = teacher.head.weight.device

    @torch.no_grad()
    def step(self, step: int, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = self.batches.step(step, **shape)
        hidden = torch.stack([self.teacher(micro_batch) for micro_batch in inputs.to(self.device)])
        return inputs, targets, hidden


class LikeliestWords:
    """Batches with ids and log-probabilities of the teacher's K likeliest words, (micro_batches, B, T, K) each.

    They are computed once, for the steps from 1 on, and take 8 K bytes per token. Ignored tokens have zeros.
    """

    def __init__(self, batches: TextBatches, teacher: Transformer, k: int, *, steps: int, **shape: int):
        self.batches, self.context, self.k = batches, batches.context, k
        taught = HiddenStates(batches, teacher)
        self.words = [
            self.look_up(teacher.head.weight, *taught.step(step, **shape)[1:]) for step in range(1, steps + 1)
        ]

    def look_up(self, head: Tensor, targets: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        counted = targets != IGNORED
        ids = torch.zeros(*targets.shape, self.k, dtype=torch.int32)
        logprobs = torch.zeros(ids.shape)
        ids[counted], logprobs[counted] = (
            found.cpu() for found in top_k(hidden[counted.to(head.device)], head, self.k)
        )
        return ids, logprobs

    def step(self, step: int, **shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, logprobs = self.words[step - 1]
        return *self.batches.step(step, **shape), ids.long(), logprobs


@torch.no_grad()
def top_k(
    hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    k: int,
) -> tuple[Tensor, Tensor]:
    """Ids, int32, and log-probabilities, fp32, of the K likeliest words of each token, (N, K) each."""
    ids = hidden.new_empty(len(hidden), k, dtype=torch.int32)
    logprobs = hidden.new_empty(len(hidden), k, dtype=torch.float32)
    for rows, chunk_ids, chunk_logprobs in zip(*(part.split(CHUNK) for part in (hidden, ids, logprobs)), strict=True):
        logits = F.linear(rows, head).float()  # (CHUNK, V)
        likeliest, words = logits.topk(k)
        chunk_ids.copy_(words)
        chunk_logprobs.copy_(likeliest - logits.logsumexp(-1, keepdim=True))
    return ids, logprobs
