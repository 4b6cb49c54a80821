"""Scorer `cur`: leverage scores of keys and values, as in a CUR decomposition."""

from typing import ClassVar

import attrs
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.stages import Choice, Integer, Scorer, View, parameter
from kvpolicy_plugins.shared.limits import MOST_RANK, SEED
from kvpolicy_plugins.shared.seeded_draws import sketch


@attrs.frozen
class Cur(Scorer):
    """Squared norms of keys and values in place of leverage scores, CurDKV (section 3); VaSE-DKV with `rank`.

    1. kk = |k|², vv = |v|², [B, K, T]; with `rank` of k G and v G, where G is a Gaussian sketch [D, rank];
    2. with `window`, each is divided by its sum over a block of so many entries that follow each other;
    3. kk, vv, (kk + vv) / 2 or kk · vv, divided by its sum over all held entries of the head: float32 [B, K, T].

    CurDKV as published is the default; `rank: 20, window: 0` is VaSE-DKV (arXiv:2606.03928). There G is drawn at every
    compression, one for keys and values and all heads of a row; here from `seed`, the layer and the row's newest
    position, so that a row draws the same alone and in a batch.

    A block of zeros scores 0, where the published code divides 0 by 0. Blocks are of the entries held, in order of
    position. The published code scores the first four tokens 1; here `protect: {sinks: 4}` keeps them.
    """

    name: ClassVar[str] = "cur"
    reference: ClassVar[str] = "arXiv:2509.15038"

    leverage: str = parameter(
        Choice(("key", "value", "average", "product")), "product", help="whose norms count: how both are combined"
    )
    window: int = parameter(Integer(minimum=0), 16, help="entries of a block that norms are divided by; 0 = none")
    rank: int = parameter(
        Integer(minimum=0, maximum=MOST_RANK), 0, help="columns of a Gaussian sketch; 0 = the vectors themselves"
    )
    seed: int = parameter(SEED, 0, help="seed of the sketch")

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "divides by sums over keys and values"

    def score(self, view: View) -> Tensor:
        return self.sketched(view, self._sketch(view) if self.rank else None)

    def sketched(self, view: View, gaussian: Tensor | None) -> Tensor:
        """`score` with the sketch given: float32 [B or 1, K or 1, D, rank]; None = without."""
        if self.leverage == "key":
            return _share(self._norms(view, view.keys, gaussian))
        values = self._norms(view, view.values, gaussian)
        if self.leverage == "value":
            return _share(values)
        keys = self._norms(view, view.keys, gaussian)
        return _share(keys * values if self.leverage == "product" else (keys + values) / 2)

    def _sketch(self, view: View) -> Tensor:
        newest = view.positions.amax((1, 2)).long()
        dim = max(view.keys.shape[-1], view.values.shape[-1])
        return sketch(self.seed, view.layer, newest, dim, self.rank)

    def _norms(self, view: View, vectors: Tensor, gaussian: Tensor | None) -> Tensor:
        """Steps 1 and 2: squared norms [B, K, T] of keys or values, 0 in empty slots."""
        vectors = vectors.float()
        if gaussian is not None:
            vectors = vectors @ gaussian[..., : vectors.shape[-1], :]
        norms = vectors.square().sum(-1).masked_fill(~view.valid, 0.0)
        return view.in_slots(_share_of_block(view.in_sequence(norms), self.window)) if self.window else norms


def _share_of_block(norms: Tensor, window: int) -> Tensor:
    """[B, K, T] divided by the sum of each block of `window` slots; the last block may be shorter."""
    entries = norms.shape[-1]
    size = min(window, max(1, entries))
    blocks = -(-entries // size)
    padded = pad(norms, (0, blocks * size - entries)).unflatten(-1, (blocks, size))
    return _share(padded).flatten(-2)[..., :entries]


def _share(norms: Tensor) -> Tensor:
    """[..., n] divided by their sum; zeros if that is 0."""
    total = norms.sum(-1, keepdim=True)
    return norms / total.where(total != 0, 1.0)
