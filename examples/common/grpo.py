"""GRPO (arXiv:2402.03300) on the task of `next_lines`, with the losses of chunked_ce or with full logits."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from chunked_ce import linear_cross_entropy, sequence_weights
from chunked_ce.objectives import PolicyGradient
from common.grpo_losses import LOSSES
from common.model import Transformer
from common.next_lines import NextLines
from common.text_data import IGNORED

SAMPLED_AT_ONCE = 8  # answers, whose logits exist together


@dataclass(frozen=True)
class Settings:
    steps: int = 12
    lines: int = 10  # that are prompts
    group: int = 8  # answers to each in a step
    epochs: int = 2  # optimizer steps for the answers of a step
    learning_rate: float = 1e-3
    warm_up: int = 80  # steps of supervised training
    seed: int = 0

    def __post_init__(self):
        for name, least in {"steps": 1, "lines": 1, "group": 2, "epochs": 1, "warm_up": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be more than 0, got {self.learning_rate}")


def warm_up(model: Transformer, task: NextLines, settings: Settings) -> None:
    """Supervised steps on answers of which half are wrong: a policy that never gets a reward learns nothing."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    steps = settings.warm_up
    for step in range(1, steps + 1):
        prompts, answers = task.examples(repeats=3, right=0.5, generator=generator)
        loss = linear_cross_entropy(hidden_of_answers(model, prompts, answers), model.head.weight, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 10 == 0:
            print(f"warm-up step {step:3}/{steps}  loss {loss.item():.4f}", flush=True)


def hidden_of_answers(model: Transformer, prompts: Tensor, answers: Tensor) -> Tensor:
    """The hidden states (B, A, D) that predict the tokens of answers (B, A) to prompts (B, P)."""
    tokens = torch.cat([prompts, answers[:, :-1].clamp(min=0)], 1)
    return model(tokens)[:, prompts.shape[1] - 1 :]


@torch.no_grad()
def sample(model: Transformer, prompts: Tensor, length: int, end: int, generator: torch.Generator) -> Tensor:
    """Answers (B, length) to prompts (B, P), `IGNORED` after their end."""
    tokens, going, answers = prompts, torch.ones(len(prompts), dtype=torch.bool), []
    for _ in range(length):
        chance = torch.rand(len(prompts), 1, generator=generator, dtype=torch.float64)
        words = torch.full((len(prompts),), end)
        if going.any():
            last = model(tokens)[going, -1].split(SAMPLED_AT_ONCE)
            chances = chance[going].split(SAMPLED_AT_ONCE)
            words[going] = torch.cat([draw(model.head(hidden), u) for hidden, u in zip(last, chances, strict=True)])
        answers.append(words.where(going, IGNORED))
        tokens = torch.cat([tokens, words.unsqueeze(1)], 1)
        going = going & (words != end)
    return torch.stack(answers, 1)


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """The word (B,) of logits (B, V) whose share of the cumulated probabilities has ``chance`` (B, 1) in it."""
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulated, chance * cumulated[:, -1:]).squeeze(1).clamp(max=logits.shape[1] - 1)


class Trainer:
    """A policy, the reference that it must not leave, and the losses of one kind."""

    def __init__(self, losses: str, model: Transformer, reference: Transformer, policy: PolicyGradient):
        self.logprobs, self.loss = LOSSES[losses]
        self.model, self.reference, self.policy = model, reference.requires_grad_(False), policy

    def step(
        self,
        task: NextLines,
        settings: Settings,
        optimizer: torch.optim.Optimizer,
        step: int,
        replayed: Tensor | None = None,  # (B, A)
    ) -> dict:
        """Samples answers, then takes an optimizer step for each epoch; returns a record of both.

        It learns from the answers ``replayed`` instead of its own, if they are given.
        """
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + step)
        started = time.perf_counter()
        lines = torch.arange(len(task)).repeat_interleave(settings.group)
        prompts = task.prompts[lines]
        answers = sample(self.model, prompts, task.answers.shape[1], task.end, generator)
        sampled = time.perf_counter()

        record = {"reward": task.rewards(lines, answers).mean().item()}
        if replayed is not None:
            record["other_answers"] = int((answers != replayed).any(1).sum())
            answers = replayed
        rewards = task.rewards(lines, answers)  # (B,)
        counted = answers != IGNORED
        # The tokens that count, (N,), for full logits too: chunked_ce leaves the others out by itself.
        advantage = advantages(rewards, settings.group).unsqueeze(1).expand_as(answers)[counted]
        target, weight = answers[counted], sequence_weights(answers, ignore_index=IGNORED)[counted].float()
        with torch.no_grad():
            models = {"old_logprob": self.model, "ref_logprob": self.reference}
            hidden = {name: hidden_of_answers(model, prompts, answers)[counted] for name, model in models.items()}
            tensors = {name: self.logprobs(hidden[name], model.head.weight, target) for name, model in models.items()}
        losses = []
        for _ in range(settings.epochs):
            hidden = hidden_of_answers(self.model, prompts, answers)[counted]
            arguments = hidden, self.model.head.weight, target, weight, {"advantage": advantage, **tensors}
            loss, sums = self.loss(self.policy, *arguments)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        ended = time.perf_counter()
        means = {name: value.item() / len(target) for name, value in sums.items()}
        record |= {"losses": losses, **means, "tokens": len(target)}
        seconds = {"sampling_seconds": sampled - started, "training_seconds": ended - sampled}
        return record | seconds | {"answers": answers.tolist()}


def advantages(rewards: Tensor, group: int) -> Tensor:
    """(B,): each reward less the mean of its group, over the group's standard deviation."""
    groups = rewards.view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()
