"""The one-pass way on a CPU: its kernels, and products with sums in fp32 as CUDA devices have them."""

import torch

from chunked_ce.engine import exponential_products


class Spied:
    """A module, and in `seen` the names that were taken from it."""

    def __init__(self, module):
        self._module, self.seen = module, []

    def __getattr__(self, name):
        self.seen.append(name)
        return getattr(self._module, name)


def install(monkeypatch, kernels):
    """Whatever the one-pass way serves takes it with these kernels; returns what they were called for."""
    spied = Spied(kernels)

    def wide_product(left, right):
        return left.float() @ right.float()

    def add_product_(total, left, right, *, first):
        product = wide_product(left, right)
        total.copy_(product if first else product + total.float())

    monkeypatch.setattr(exponential_products, "_kernels", lambda call: spied)
    monkeypatch.setattr(exponential_products, "wide_product", wide_product)
    monkeypatch.setattr(exponential_products, "add_product_", add_product_)
    return spied.seen


def install_product(monkeypatch, product):
    """Its products take the exponentials themselves; returns what that product was called for."""
    spied = Spied(product)
    monkeypatch.setattr(exponential_products, "_product_kernels", lambda source: spied)
    return spied.seen


def zipf(case, *, bias=8.0, seed=0):
    """The same problem with a few frequent targets, drawn from what the head predicts: sums of gradients cancel."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (x.detach().double() for x in (case.hidden, case.head))
    along = torch.nn.functional.normalize(torch.randn(head.shape[1], generator=generator, dtype=torch.float64), dim=0)
    logs = -torch.arange(1, len(head) + 1, dtype=torch.float64).log()
    hidden = hidden - (hidden @ along).unsqueeze(1) * along + bias * along
    head = head - (head @ along).unsqueeze(1) * along + ((logs - logs.mean()) / bias).unsqueeze(1) * along
    hidden, head = (x.to(case.head.dtype).requires_grad_() for x in (hidden, head))
    return drawn(case.fresh(hidden=hidden, head=head), seed=seed)


def drawn(case, *, seed=0):
    """The same problem with targets drawn from what the head predicts, as those of a trained model."""
    probabilities = (case.hidden.detach().double() @ case.head.detach().double().t()).softmax(-1)
    target = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    return case.fresh(target=target.where(case.target != case.ignore_index, case.target))


def confident(case):
    """The same problem with the likeliest entry as each target."""
    target = (case.hidden.detach().double() @ case.head.detach().double().t()).argmax(1)
    return case.fresh(target=target.where(case.target != case.ignore_index, case.target))
