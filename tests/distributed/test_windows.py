"""Windows of sequences over ranks and accumulation steps: the mean over tokens, and the mean over sequences."""

import pytest
import torch
import torch.distributed as dist

from chunked_ce import TokenMean, linear_loss, sequence_weights
from chunked_ce.objectives import PolicyGradient
from tests.distributed.threads import run_threads

V, D, LENGTH = 23, 6, 9
# Tokens of each sequence that count, by rank and micro-batch: a generation batch with answers of all lengths.
WINDOW = [[[9, 2, 4], [1]], [[5], [7, 7]], [[], [3, 0]]]
POLICY = PolicyGradient(clip_low=0.1, clip_high=0.3)


def micro_batch(rank, step):
    """Hidden states (B, T, D), targets (B, T), and an advantage for each sequence (B, T)."""
    lengths = WINDOW[rank][step]
    generator = torch.Generator().manual_seed(10 * rank + step)
    hidden = torch.randn(len(lengths), LENGTH, D, generator=generator, dtype=torch.float64)
    target = torch.randint(V, (len(lengths), LENGTH), generator=generator)
    for row, length in zip(target, lengths, strict=True):
        row[length:] = -100
    advantage = torch.randn(len(lengths), 1, generator=generator).expand_as(target)
    old = -3 + 0.5 * torch.randn(target.shape, generator=generator)
    return hidden, target, {"advantage": advantage, "old_logprob": old}


def head():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def in_one_process(over_sequences):
    """The mean as papers write it, and its gradient: of each sequence's mean, or of all tokens together."""
    weight, sequences = head(), []
    for rank, steps in enumerate(WINDOW):
        for step in range(len(steps)):
            hidden, target, tensors = micro_batch(rank, step)
            for i, length in enumerate(steps[step]):
                named = {name: tensor[i, :length] for name, tensor in tensors.items()}
                rows = hidden[i, :length], weight, target[i, :length]
                sequences.append(linear_loss(POLICY, *rows, reduction="none", **named))
    counted = [losses for losses in sequences if len(losses)]
    loss = sum(losses.mean() for losses in counted) / len(counted) if over_sequences else torch.cat(counted).mean()
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("over_sequences", [False, True], ids=["tokens", "sequences"])
def test_a_window_over_ranks_and_steps(over_sequences):
    """Every step adds to the gradient and the engine averages over the ranks, as DDP does."""
    expected, gradient = in_one_process(over_sequences)

    def train(rank, world_size):
        batches, weight = [micro_batch(rank, step) for step in range(2)], head()
        targets = [target for _, target, _ in batches]
        weights = [sequence_weights(target) for target in targets] if over_sequences else None
        mean, sums = TokenMean.over(targets, weights=weights), []
        for i, (hidden, target, tensors) in enumerate(batches):
            share = {} if weights is None else {"token_weight": weights[i]}
            loss_sum = linear_loss(POLICY, hidden, weight, target, reduction="sum", **share, **tensors)
            mean(loss_sum).backward()
            sums.append(loss_sum.detach())
        dist.all_reduce(weight.grad)
        torch.testing.assert_close(weight.grad / world_size, gradient)
        torch.testing.assert_close(mean.report(sums), expected)
        lengths = [length for steps in WINDOW for step in steps for length in step]
        assert mean.num_tokens.item() == pytest.approx(sum(map(bool, lengths)) if over_sequences else sum(lengths))

    run_threads(train, len(WINDOW))


def test_weights_of_sequences():
    target = torch.tensor([[[1, -100, 2], [-100, -100, -100]], [[5, 5, 5], [-100, 0, -100]]], dtype=torch.int32)
    weights = sequence_weights(target)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [[[0.5, 0, 0.5], [0, 0, 0]], [[1 / 3] * 3, [0, 1, 0]]]
    assert sequence_weights(torch.tensor([0, 1, 0]), ignore_index=0).tolist() == [0, 1, 0]
    assert sequence_weights(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    assert sequence_weights(torch.tensor(3)) == 1


def test_the_sum_of_weights():
    """Of the targets that count: whatever weight the others have."""
    targets = [torch.tensor([4, -100, 2]), torch.tensor([1])]
    weights = [torch.tensor([0.5, torch.nan, 2.0]), torch.tensor([3])]
    assert TokenMean.over(targets, weights=weights).num_tokens == 5.5
    assert TokenMean.over(targets[0], weights=torch.tensor([True, True, False])).num_tokens == 1
    assert TokenMean.over([], weights=[]).num_tokens == 0
    assert TokenMean.over([target.to("meta") for target in targets], weights=[w.to("meta") for w in weights])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([torch.ones(3)], ValueError, "weights must hold a tensor for each of the 2 of targets, held 1"),
        ([torch.ones(3), torch.ones(2)], ValueError, r"weights must have the shape of targets, \(1,\), had \(2,\)"),
        ([torch.ones(3), 1.0], TypeError, "weights must hold tensors, held 1.0"),
        ([torch.ones(3), torch.ones(1, dtype=torch.complex64)], TypeError, "weights must be boolean, an integer or"),
        ([torch.ones(3), torch.tensor([-9.0])], ValueError, "weights must have a finite sum >= 0 .*, was .* -7.0"),
        ([torch.tensor([1, 1, torch.nan]), torch.ones(1)], ValueError, "weights must have a finite sum >= 0"),
        (2.0, TypeError, "weights must be a tensor or an iterable of tensors, was 2.0"),
    ],
)
def test_wrong_weights(weights, error, message):
    with pytest.raises(error, match=message):
        TokenMean.over([torch.tensor([4, -100, 2]), torch.tensor([1])], weights=weights)


@pytest.mark.parametrize("target", [torch.ones(3), [1, 2], None])
def test_wrong_targets(target):
    with pytest.raises(TypeError, match="target must be"):
        sequence_weights(target)
