import numpy as np
import pytest
import torch
from common.text_data import IGNORED, TextBatches, load_tokens

CONTEXT = 16
TOKENS = np.arange(1000, dtype=np.int32)


def test_tekken_over_pythons_own_text():
    tokens = load_tokens()
    assert tokens.dtype == np.int32
    assert len(tokens) > 1_000_000
    assert tokens.min() >= 0 and tokens.max() < 131_072


def test_targets_are_the_next_tokens():
    inputs, targets = TextBatches(TOKENS, CONTEXT).step(1, micro_batches=2, batch=3)
    assert inputs.shape == targets.shape == (2, 3, CONTEXT)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_ranks_share_out_what_one_process_sees(mask_prompt):
    batches = TextBatches(TOKENS, CONTEXT, mask_prompt=mask_prompt)
    ranks = [batches.step(5, micro_batches=2, batch=3, rank=rank, ranks=2) for rank in (0, 1)]
    alone = batches.step(5, micro_batches=4, batch=3)
    for kind in (0, 1):
        assert torch.equal(alone[kind][0::2], ranks[0][kind])
        assert torch.equal(alone[kind][1::2], ranks[1][kind])


def test_steps_and_seeds_differ_and_repeat():
    def inputs(seed: int, step: int) -> torch.Tensor:
        return TextBatches(TOKENS, CONTEXT, seed).step(step, micro_batches=1, batch=8)[0]

    assert torch.equal(inputs(0, 1), inputs(0, 1))
    assert not torch.equal(inputs(0, 1), inputs(0, 2))
    assert not torch.equal(inputs(0, 1), inputs(1, 1))


def test_mask_prompt_leaves_uneven_counts():
    batches = TextBatches(TOKENS, CONTEXT, mask_prompt=True)
    _, targets = batches.step(1, micro_batches=4, batch=2)
    counts = (targets != IGNORED).sum(-1)  # (micro_batches, batch)
    assert 1 <= counts.min() < counts.max() <= CONTEXT
    assert len(counts.sum(-1).unique()) > 1
    prompt = targets == IGNORED
    assert torch.equal(prompt, prompt.flip(-1).cummax(-1).values.flip(-1)), "masked tokens come first"


def test_text_as_long_as_one_window_and_one_too_short():
    inputs, targets = TextBatches(TOKENS[: CONTEXT + 1], CONTEXT).step(1, micro_batches=1, batch=2)
    assert inputs[0, 0].tolist() == list(range(CONTEXT))
    assert targets[0, 0].tolist() == list(range(1, CONTEXT + 1))
    with pytest.raises(ValueError, match="16 tokens, too few for a context of 16"):
        TextBatches(TOKENS[:CONTEXT], CONTEXT)
