"""The formulas of `linear_statistics` on full logits, and random calls of it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit", "is_top1")
OF_SUPPORT = ("logprob", "entropy", "lse")
IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    target: Tensor  # (N,) or (N, K)
    bias: Tensor | None = None  # (V,)
    support: Tensor | None = None  # (N, S)
    terms: dict = field(default_factory=dict)  # softcap, logit_scale, temperature

    def leaves(self):
        return [leaf for leaf in (self.hidden, self.head, self.bias) if leaf is not None and leaf.requires_grad]

    def arguments(self):
        return self.hidden, self.head, self.target

    def keywords(self):
        found = {"linear_bias": self.bias, "support": self.support} | self.terms
        return {name: value for name, value in found.items() if value is not None}

    def outputs(self):
        if self.support is not None:
            return OF_SUPPORT
        return OUTPUTS if self.target.dim() == 1 else OUTPUTS[:-1]

    def double(self):
        """The same numbers in float64, as new leaves."""

        def widened(tensor):
            return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

        terms = {name: value.double() if isinstance(value, Tensor) else value for name, value in self.terms.items()}
        leaves = widened(self.hidden), widened(self.head)
        return Inputs(*leaves, self.target, widened(self.bias), self.support, terms)


def inputs(n, d, vocab, *, num_ids=None, size=None, dtype=torch.float32, bias=False, terms=(), ignored=0.25, seed=0):
    """A random call: ``num_ids`` ids per token, a support of ``size``; ids are padding with probability ``ignored``."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()

    def ids(*shape):
        found = torch.randint(vocab, shape, generator=g)
        return found.masked_fill(torch.rand(shape, generator=g) < ignored, IGNORED)

    values = {"softcap": 4.0, "logit_scale": 0.7}
    values["temperature"] = torch.rand(n, generator=g) + 0.5
    hidden, head = normal(n, d), normal(vocab, d, scale=2 * d**-0.5)
    target = ids(n) if num_ids is None else ids(n, num_ids)
    support = None if size is None else ids(n, size)
    if n > 2 and num_ids is not None:
        target[0] = IGNORED
        target[1] = target[1, :1]  # equals
    if n > 4 and size:
        support[2], support[3, 0] = IGNORED, target[3].flatten()[0]  # none, and the target among them
        support[4] = support[4, :1]
    return Inputs(hidden, head, target, normal(vocab) if bias else None, support, {one: values[one] for one in terms})


def expected(call, outputs=None):
    """The outputs by name, from full logits in the dtype of the call, float32 at least."""
    z = F.linear(call.hidden, call.head, call.bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z * call.terms.get("logit_scale", 1.0)
    if "softcap" in call.terms:
        z = call.terms["softcap"] * torch.tanh(z / call.terms["softcap"])
    if "temperature" in call.terms:
        z = z / call.terms["temperature"].unsqueeze(-1)
    ids = call.target.unsqueeze(-1) if call.target.dim() == 1 else call.target
    counted = (ids != IGNORED).any(-1)
    if call.support is not None:
        z = z.masked_fill(~members(ids, call.support, z.shape[-1], counted), -torch.inf)
    lse, log_p = z.logsumexp(-1), z.log_softmax(-1)
    valid = ids != IGNORED
    logprob = log_p.gather(-1, ids.where(valid, 0)).where(valid, 0)
    found = {
        "logprob": logprob.squeeze(-1) if call.target.dim() == 1 else logprob,
        "entropy": -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1),
        "lse": lse,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logit": z.mean(-1),
        "is_top1": (z.argmax(-1, keepdim=True) == ids).to(z.dtype)[:, 0],
    }
    keep = {name: found[name] for name in outputs or call.outputs()}
    return {name: v if v.dim() > 1 or v is found["logprob"] else v.where(counted, 0) for name, v in keep.items()}


def members(ids, support, vocab, counted):
    """Which vocabulary entries are in the support of each token, (N, V); all of an ignored one."""
    marks = torch.zeros(len(ids), vocab + 1, dtype=torch.bool)
    for part in (ids, support):
        marks.scatter_(1, part.where(part != IGNORED, vocab), True)
    return marks[:, :vocab] | ~counted.unsqueeze(-1)


def upstream_of(values):
    """An upstream gradient for each output."""
    g = torch.Generator().manual_seed(3)
    return {name: torch.randn(one.shape, generator=g, dtype=torch.float64) for name, one in values.items()}


def gradients(values, leaves, **keywords):
    """The gradients of the leaves for the upstream gradients of all outputs together."""
    upstream = upstream_of(values)
    total = sum((one * upstream[name].to(one.dtype)).sum() for name, one in values.items() if one.requires_grad)
    return torch.autograd.grad(total, leaves, **keywords)
