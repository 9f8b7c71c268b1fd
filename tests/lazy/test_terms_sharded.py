"""What statistics answer is the same where every rank holds the rows of some words only."""

import pytest
import torch

from chunked_ce import ChunkOptions, LMHead, VocabShard
from tests.distributed.threads import run_threads
from tests.lazy.test_terms import FOLLOWED, TOKENS, VOCAB, WIDTH, outcome

NEED_LOGITS = (
    "shifted by another number",
    "amax",
    "amin",
    "largest of all",
    "min",
    "every other word",
    "best of some words",
    "best of log-probabilities",
    "worst of negative ones",
    "best at a temperature of each token",
    "best probability",
)
FORMS = {name: form for name, form in FOLLOWED.items() if name not in NEED_LOGITS}
RANKS = 2


def problem(rank: int):
    """The whole head, and the hidden states of a rank."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(RANKS, *TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return head, states[rank].clone().requires_grad_()


def on_a_rank(rank: int, world_size: int, tokens: str) -> dict:
    torch.set_num_threads(1)
    whole, hidden = problem(rank if tokens == "own" else 0)
    shard = VocabShard.split(VOCAB, tokens=tokens)
    keywords = {"vocab": shard, "options": ChunkOptions(chunk_size=5)}
    head = LMHead(WIDTH, VOCAB, bias=True, dtype=torch.float64, **keywords)
    with torch.no_grad():
        for mine, all_rows in zip(head.parameters(), whole.parameters(), strict=True):
            mine.copy_(all_rows[shard.start : shard.stop])
    return {name: outcome(form, head, hidden) for name, form in FORMS.items()}


@pytest.mark.parametrize("tokens", ["same", "own"])
def test_values_and_gradients(tokens):
    results = run_threads(on_a_rank, RANKS, tokens)
    for name, form in FORMS.items():
        plain = [outcome(form, *problem(rank if tokens == "own" else 0)) for rank in range(RANKS)]
        for (values, _), (expected, _) in zip([result[name] for result in results], plain, strict=True):
            torch.testing.assert_close(values, expected, msg=lambda text, name=name: f"{name}: {text}")
        gradients = [result[name][1] for result in results]
        for at in range(len(gradients[0])):
            mine, theirs = [one[at] for one in gradients], [one[1][at] for one in plain]
            if at % 3:  # rows of the weight and the bias
                mine = [torch.cat(mine)]
                theirs = [sum(theirs) / RANKS] if tokens == "own" else theirs[:1]
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")
