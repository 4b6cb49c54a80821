"""Predictions of a text compared with those of the full cache."""

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Comparison:
    """Per row and token, [R, t]: KL divergence in nats, whether the likeliest token is the same, log-likelihood."""

    kl: Tensor
    same: Tensor
    likelihood: Tensor


def compared(logits: Tensor, reference: Tensor, following: Tensor) -> Comparison:
    """Logits [R, t, V] against those of the full cache; `following` are the tokens [R, t] that came."""
    ours, full = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1).clamp(min=0)
    likelihood = ours.gather(-1, following[..., None]).squeeze(-1)
    return Comparison(kl, logits.argmax(-1) == reference.argmax(-1), likelihood)


def metrics_of(parts: Sequence[Comparison]) -> Iterator[dict[str, float]]:
    """The metrics of every row, over parts that follow one another."""
    kl, same, likelihood = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("kl", "same", "likelihood")
    )
    for row in range(kl.shape[0]):
        differs = (~same[row]).nonzero()
        yield {
            "kl": float(kl[row].mean()),
            "top1": float(same[row].float().mean()),
            "agreed": float(differs[0]) if len(differs) else float(same.shape[1]),
            "nll": -float(likelihood[row].mean()),
        }
