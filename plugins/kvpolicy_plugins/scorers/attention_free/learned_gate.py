"""Scorer `learned_gate`: a linear map of the key, learned beforehand, tells whether an entry is worth keeping."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Integer, Needs, Number, Rotary, Sample, Scorer, Site, View, parameter

_QUERIES = 512  # of a text whose attention exists at one time
_LEAST = -20.0  # logarithm of attention below which a text tells nothing


@attrs.frozen
class LearnedGate(Scorer):
    """A retention logit of each entry, w·k + b with w [D] and b of its KV head and layer; float32 [B, K, T].

    Gates of this kind decide what stays in DMS (arXiv:2506.05345), which trains them with the model, and in KVzap. No
    published weights come with this plugin. They are part of a calibration: `weight` [K, D] and `bias` [K] of each
    layer, measured by `calibrate`, or trained elsewhere and put in their place:
    `attrs.evolve(policy.calibrate(model, tokens), layers=...)`. Gates that read the hidden state rather than the key
    (TrimKV, KVzap) cannot be expressed.

    `calibrate` learns, as KVzap's linear surrogate does, to predict the logarithm of the largest attention that an
    entry gets, here on the text itself. With y_t the largest log-probability that any query of the group, `delay` or
    more tokens behind entry t, gives it (at least -20), and C the covariance of the keys,

        w = (C + ridge · mean of C's diagonal)⁻¹ cov(k, y),    b = mean of y - w · mean of k.

    Of a text shorter than twice the delay, half its length takes the place of the delay. A threshold on such scores is
    a logarithm of attention; with the allocator `threshold` this is KVzap's eviction, but for what the gate reads.
    """

    name: ClassVar[str] = "learned_gate"
    reference: ClassVar[str] = "arXiv:2601.07891"

    keys: str = parameter(Choice(("rotated", "unrotated")), "unrotated", help="keys after or before rotation")
    delay: int = parameter(
        Integer(minimum=0, maximum=2**20), 128, help="calibration: how far behind an entry queries count"
    )
    ridge: float = parameter(
        Number(minimum=0, maximum=1e6),
        1e-3,
        help="calibration: what is added to the variances of keys, in units of them",
    )

    def needs(self) -> Needs:
        return Needs(rotary=self.keys == "unrotated")

    @property
    def calibrated(self) -> bool:
        return True

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        return [self._fitted(sample) for sample in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        heads, dim = site.geometry.kv_heads, site.geometry.head_dim
        expected = {"weight": (heads, dim), "bias": (heads,)}
        given = {name: tuple(tensor.shape) for name, tensor in site.calibration.items()}
        if given != expected:
            raise ParameterError(f"must be a gate of shapes {expected}: {given}")

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "reads a calibration"

    def score(self, view: View) -> Tensor:
        keys = view.keys.float() if self.keys == "rotated" else view.unrotated_keys
        weight, bias = (view.calibration[name].to(torch.float32) for name in ("weight", "bias"))
        logits: Tensor = (keys @ weight[..., None]).squeeze(-1) + bias[:, None]
        return logits

    def _fitted(self, sample: Sample) -> dict[str, Tensor]:
        """Float32 `weight` [K, D] and `bias` [K] of one layer."""
        tokens = sample.keys.shape[2]
        delay = min(self.delay, tokens // 2)
        target = largest_attention(sample, delay).double()[..., : tokens - delay].transpose(0, 1).flatten(1)  # [K, n]
        keys = self._shown(sample.keys.double(), sample.rotary)[:, :, : tokens - delay].transpose(0, 1).flatten(1, 2)
        centred, wanted = keys - keys.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
        covariance = centred.mT @ centred / keys.shape[1]
        diagonal = torch.diagonal(covariance, dim1=-2, dim2=-1)
        ridge = self.ridge * diagonal.mean(-1) + 1e-9
        penalty = torch.diag_embed(ridge[:, None].expand_as(diagonal))
        towards = centred.mT @ wanted[..., None] / keys.shape[1]
        weight = torch.linalg.solve(covariance + penalty, towards).squeeze(-1)
        bias = target.mean(1) - (weight * keys.mean(1)).sum(-1)
        return {"weight": weight.float(), "bias": bias.float()}

    def _shown(self, keys: Tensor, rotary: Rotary | None) -> Tensor:
        """Keys [S, K, T, D] of a text, as the gate reads them."""
        if self.keys == "rotated":
            return keys
        if rotary is None:
            raise ParameterError("the rotary embedding of the model is not known")
        return rotary.unrotate(keys, torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3]))


def largest_attention(sample: Sample, delay: int) -> Tensor:
    """Float32 [S, K, T]: the largest log-probability that a query `delay` or more tokens behind gives each entry.

    The value is at least -20; that of the last `delay` entries, which no such query sees, is -20.
    """
    places = torch.arange(sample.keys.shape[2], device=sample.keys.device)
    most = torch.full(sample.keys.shape[:3], _LEAST, dtype=torch.float32, device=sample.keys.device)
    for row, keys in enumerate(sample.keys.float()):
        grouped = sample.queries[row].float().unflatten(0, (len(keys), -1))  # [K, G, T, D]
        for queries, own in zip(grouped.split(_QUERIES, 2), places.split(_QUERIES), strict=True):
            behind = own[:, None] - places
            logits = sample.scaling * queries @ keys[:, None].mT
            shares = logits.masked_fill(behind < 0, -torch.inf).log_softmax(-1)
            most[row] = most[row].maximum(shares.masked_fill(behind < delay, -torch.inf).amax((1, 2)))
    return most
