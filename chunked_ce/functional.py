import torch.nn.functional as F


def linear_cross_entropy(input, linear_weight, target, *, reduction="mean", ignore_index=-100, **keywords):
    return F.cross_entropy(F.linear(input, linear_weight).float().flatten(0, -2), target.flatten().long(), reduction=reduction, ignore_index=ignore_index)
