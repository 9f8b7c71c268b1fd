"""The formulas of the loss in float64 numpy, as plainly as they can be written.

`rows(raw, target, ...)` is the loss of logits that exist; `linear_rows(hidden, head, target, ...)` makes
them first. Both leave ignored tokens out before anything is computed: garbage there reaches no result.

A field `x_scale` bounds how rounding errors reach the field `x`: a correct implementation in a format of
machine epsilon e is within a small multiple of e * x_scale. It is the sum of the absolute values of the terms
of x, each times 1 + the absolute terms of its row's logits where an error of a logit passes to the term.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Every quantity of every token, 0 where ignored, and its derivative by the raw logits."""

    counted: np.ndarray  # (N,) bool: not ignored
    share: np.ndarray  # (N,) token_weight * w[y]: what the token adds to the denominator of the mean
    lse: np.ndarray  # (N,) -inf where ignored
    hit: np.ndarray  # (N,) bool: the target is the argmax
    loss: np.ndarray  # (N,)
    loss_scale: np.ndarray
    logprob: np.ndarray  # (N,)
    logprob_scale: np.ndarray
    entropy: np.ndarray  # (N,)
    entropy_scale: np.ndarray
    d_loss: np.ndarray  # (N, V)
    d_loss_scale: np.ndarray
    d_logprob: np.ndarray  # (N, V)
    d_logprob_scale: np.ndarray
    d_entropy: np.ndarray  # (N, V)
    d_entropy_scale: np.ndarray

    def coefficient(self, reduction, num_tokens=None):
        """d value / d loss_i, (N,)."""
        if reduction != "mean":
            return np.ones(len(self.loss))
        denominator = self.share.sum() if num_tokens is None else num_tokens
        return np.full(len(self.loss), 1 / denominator if self.counted.any() else 0.0)

    def reduce(self, reduction, num_tokens=None):
        """The loss and its scale: (N,) for "none", numbers otherwise."""
        if reduction == "none":
            return self.loss, self.loss_scale
        coefficient = self.coefficient(reduction, num_tokens)
        return (self.loss * coefficient).sum(), (self.loss_scale * abs(coefficient)).sum()

    def gradients(self, of, hidden, head, upstream):
        """Of `sum_i upstream_i * self.<of>_i` by (hidden, head, bias): three pairs of value and scale.

        `upstream` is (N,). The gradient by the raw logits is `upstream[:, None] * self.d_<of>`.
        """
        hidden, head, upstream = (x.astype(np.float64) for x in (hidden, head, upstream))
        kept = self.counted
        d = upstream[kept, None] * getattr(self, f"d_{of}")[kept]
        scale = abs(upstream[kept, None]) * getattr(self, f"d_{of}_scale")[kept]
        d_hidden, d_hidden_scale = np.zeros(hidden.shape), np.zeros(hidden.shape)
        d_hidden[kept] = d @ head
        d_hidden_scale[kept] = scale @ abs(head)
        return (
            (d_hidden, d_hidden_scale),
            (d.T @ hidden[kept], scale.T @ abs(hidden[kept])),
            (d.sum(axis=0), scale.sum(axis=0)),
        )

    def stats(self):
        """The sums of LossStats."""
        return {
            "loss_sum": self.loss.sum(),
            "num_tokens": self.share.sum(),
            "num_correct": float(self.hit.sum()),
            "entropy_sum": self.entropy.sum(),
            "lse_max": self.lse.max(initial=-np.inf),
        }


def linear_rows(hidden, head, target, *, bias=None, weight=None, ignore_index=-100, logit_scale=1.0, **options):
    """The rows of the logits `hidden @ head.T + bias`; `weight` are the weights of the classes."""
    counted = target != ignore_index
    hidden, head = hidden[counted].astype(np.float64), head.astype(np.float64)
    bias = np.zeros(len(head)) if bias is None else bias.astype(np.float64)
    raw = np.zeros((len(target), len(head)))
    raw[counted] = hidden @ head.T + bias
    terms = abs(logit_scale) * (abs(hidden) @ abs(head).T + abs(np.where(np.isfinite(bias), bias, 0.0)))
    return rows(
        raw,
        target,
        weight=weight,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        terms=terms.max(axis=1, initial=0.0),
        **options,
    )


def rows(
    raw,  # (N, V)
    target,  # (N,)
    *,
    weight=None,  # (V,)
    token_weight=None,  # (N,)
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    terms=None,  # (counted,) largest sum of absolute terms of a logit of the row
):
    """The rows of the logits `raw`."""
    n, vocab = raw.shape
    counted = target != ignore_index
    y = target[counted]
    assert ((y >= 0) & (y < vocab)).all()
    i = np.arange(len(y))
    hot = np.zeros((len(y), vocab))
    hot[i, y] = 1.0
    eps = label_smoothing
    w = np.ones(vocab) if weight is None else weight.astype(np.float64)
    wy = w[y]
    t = np.ones(len(y)) if token_weight is None else token_weight[counted].astype(np.float64)

    u = logit_scale * raw[counted].astype(np.float64)
    z, dz = u, np.full_like(u, logit_scale)
    if softcap is not None:
        z, dz = softcap * np.tanh(u / softcap), logit_scale * (1 - np.tanh(u / softcap) ** 2)
    top = z.max(axis=1, initial=-np.inf)
    lse = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
    logp = (z - top[:, None]) - (lse - top)[:, None]
    p = np.exp(logp)
    finite_logp = np.where(p > 0, logp, 0.0)  # p log p -> 0 as p -> 0
    nll = -logp[i, y]
    smoothing = (eps / vocab) * (w * -logp).sum(axis=1) if eps else 0.0
    entropy = -(p * finite_logp).sum(axis=1)

    # d loss_i / d z_iv = t_i * (d_lse_i * p_iv - (1 - eps) * w_y * hot_iv - eps / V * w_v)
    d_lse = (1 - eps) * wy + eps / vocab * w.sum() + 2 * z_loss * lse
    d_lse_scale = (1 - eps) * abs(wy) + eps / vocab * abs(w).sum() + 2 * z_loss * (1 + abs(lse))
    hot_share, uniform_share = ((1 - eps) * wy)[:, None] * hot, eps / vocab * w
    d_loss = t[:, None] * (d_lse[:, None] * p - hot_share - uniform_share) * dz
    d_loss_scale = abs(t)[:, None] * (d_lse_scale[:, None] * p + abs(hot_share) + abs(uniform_share))
    d_entropy = -p * (finite_logp + entropy[:, None]) * dz
    d_entropy_scale = p * (1 + abs(finite_logp) + entropy[:, None])

    terms = abs(np.where(np.isfinite(u), u, 0.0)).max(axis=1, initial=0.0) if terms is None else terms
    reach = 1 + terms + abs(lse)
    loss_scale = abs(t) * (d_lse_scale * reach + z_loss * lse**2)
    entropy_scale = reach * (p * (1 + abs(finite_logp))).sum(axis=1)
    d_reach = abs(logit_scale) * reach[:, None]

    def spread(values, fill=0.0):
        full = np.full((n, *values.shape[1:]), fill, dtype=values.dtype)
        full[counted] = values
        return full

    return Rows(
        counted=counted,
        share=spread(t * wy),
        lse=spread(lse, -np.inf),
        hit=spread(z.argmax(axis=1) == y, False),
        loss=spread(t * ((1 - eps) * wy * nll + smoothing + z_loss * lse**2)),
        loss_scale=spread(loss_scale),
        logprob=spread(-nll),
        logprob_scale=spread(reach),
        entropy=spread(entropy),
        entropy_scale=spread(entropy_scale),
        d_loss=spread(d_loss),
        d_loss_scale=spread(d_loss_scale * d_reach),
        d_logprob=spread((hot - p) * dz),
        d_logprob_scale=spread((hot + p) * d_reach),
        d_entropy=spread(d_entropy),
        d_entropy_scale=spread(d_entropy_scale * d_reach),
    )
