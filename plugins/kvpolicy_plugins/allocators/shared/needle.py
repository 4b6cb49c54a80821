"""Copying a needle: how much each head looks back at a span that is repeated, as retrieval heads do."""

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Sample

_SHARE = 4  # a needle is at most this part of its row


@attrs.frozen(eq=False)
class Needles:
    """One needle a row: n consecutive tokens of it, which come again as its last n tokens.

    Depths are spread evenly over the rows, from their beginning to where the repetition begins. With the correct
    continuation forced, the last n queries are those of a model that copies (the recipe of arXiv:2404.15574).
    """

    length: int  # n
    starts: Tensor  # [S] int64
    tokens: int  # T

    @classmethod
    def of(cls, rows: int, tokens: int, longest: int, device: torch.device) -> "Needles":
        """Needles of `longest` tokens, or of a quarter of the T `tokens` of a row if that is less."""
        length = max(1, min(longest, tokens // _SHARE))
        places = 2 * torch.arange(rows, device=device) + 1
        return cls(length, places * (tokens - 2 * length) // (2 * rows), tokens)

    def repeated(self, text: Tensor) -> Tensor:
        """Rows [S, T] of a text whose last n tokens are replaced by their needles."""
        slots = self.starts[:, None] + torch.arange(self.length, device=text.device)
        return torch.cat([text[:, : -self.length], text.gather(1, slots)], 1)

    @property
    def inside(self) -> Tensor:
        """[S, 1, 1, T] bool: the slots of the needles, in the shape of `attention`."""
        places = torch.arange(self.tokens, device=self.starts.device) - self.starts[:, None]
        return ((places >= 0) & (places < self.length))[:, None, None]

    def attention(self, sample: Sample) -> Tensor:
        """Probabilities [S, H, n, T] float32 of the last n queries, those at which needles are repeated."""
        keys = sample.keys.float()[:, :, None]
        queries = sample.queries[:, :, -self.length :].float().unflatten(1, (keys.shape[1], -1))
        logits = (sample.scaling * queries @ keys.mT).flatten(1, 2)
        places = torch.arange(self.tokens, device=logits.device)
        later = places > places[-self.length :, None]
        probabilities: Tensor = logits.masked_fill(later, -torch.inf).softmax(-1)
        return probabilities


def best_inside(attention: Tensor, inside: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """Of the `best` entries with the most attention [..., T], the mass of those inside a needle, and of the others.

    `inside` [..., T] is bool. Ties: the earlier entry.
    """
    order = attention.argsort(dim=-1, descending=True, stable=True)[..., :best]
    mass = attention.gather(-1, order)
    hits = inside.expand_as(attention).gather(-1, order)
    return mass.where(hits, 0.0).sum(-1), mass.where(~hits, 0.0).sum(-1)


def retrieval_score(attention: Tensor, inside: Tensor, length: int) -> Tensor:
    """HeadKV's measure [...] of attention [..., T]: a / n of every needle entry among the n with the most attention."""
    return best_inside(attention, inside, length)[0] / length
