"""Scorer `expected_attention`: the attention that queries to come are expected to give."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Flag, Integer, Needs, Number, Rotary, Sample, Scorer, Site, View, parameter
from kvpolicy_plugins.shared.limits import QUERIES


@attrs.frozen
class ExpectedAttention(Scorer):
    """Attention of Gaussian queries, as those so far, at positions to come, times the norm of the value (section 3).

    For each query head, of queries before rotation at positions behind the sinks:

    1. mu = their mean [D], C = their (biased) covariance [D, D];
    2. R = the mean of the rotations to the next `future` positions; mu' = R mu, C' = R C Rᵀ;
    3. z = s · mu'·k + s² · kᵀ C' k / 2 for every key behind the sinks, s the model's scaling: the logarithm of the
       expected exp(s · q·k);
    4. A = softmax(z) over these keys, mean over the query heads of a KV head, [B, K, T];
    5. score = (A + epsilon) · |v|, or A without `value_norm`. Float32.

    Statistics are those of the last `queries` queries, or with `statistics: calibrated` those of a text. The published
    code takes all queries of a prompt, and of the last 256 tokens while decoding. `covariance: false` leaves C out.
    """

    name: ClassVar[str] = "expected_attention"
    reference: ClassVar[str] = "arXiv:2510.00636"
    calibrated_by: ClassVar[tuple[str, ...]] = ("statistics",)

    queries: int = parameter(QUERIES, 256, help="how many of the last queries statistics are of")
    statistics: str = parameter(
        Choice(("observed", "calibrated")), "observed", help="of queries of the sequence, or of those of a text"
    )
    future: int = parameter(Integer(minimum=1, maximum=2**16), 512, help="positions to come that are averaged over")
    covariance: bool = parameter(Flag(), True, help="whether the covariance of queries counts")
    value_norm: bool = parameter(Flag(), True, help="multiply by the norm of the value")
    epsilon: float = parameter(Number(minimum=0, maximum=1), 0.0, help="added to the attention before that")

    def needs(self) -> Needs:
        return Needs(queries=0 if self.calibrated else self.queries, rotary=True)

    @property
    def calibrated(self) -> bool:
        return self.statistics == "calibrated"

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        return [_of_text(sample) for sample in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        heads, dim = site.geometry.query_heads, site.geometry.head_dim
        expected = {"mean": (heads, dim), "covariance": (heads, dim, dim)}
        given = {name: tuple(tensor.shape) for name, tensor in site.calibration.items()}
        if given != expected:
            raise ParameterError(f"must be statistics of shapes {expected}: {given}")

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "multiplies keys by a matrix of each query head"

    def score(self, view: View) -> Tensor:
        inside = view.valid & (view.positions >= view.sinks)
        logits = self._logits(view, *self.statistics_of(view)).masked_fill(~inside[:, :, None], -torch.inf)
        attention = logits.softmax(-1).nan_to_num(0.0).mean(2)  # NaN: a head that holds nothing behind the sinks
        if not self.value_norm:
            return attention
        norms: Tensor = torch.linalg.vector_norm(view.values.float(), dim=-1)
        return (attention + self.epsilon) * norms

    def statistics_of(self, view: View) -> tuple[Tensor, Tensor | None]:
        """Step 2: mean [B, H, D] and covariance [B, H, D, D] of queries at positions to come; None if left out."""
        rotary = view.rotary
        if rotary is None:
            raise ValueError("this view has no rotary embedding")
        if self.calibrated:
            mean, covariance = (view.calibration[name].float()[None] for name in ("mean", "covariance"))
        else:
            positions = view.window_positions[:, -self.queries :]
            shown = positions >= view.sinks
            queries = view.window[:, :, -self.queries :].float()
            mean, covariance = _moments(rotary.unrotate(queries, positions[:, None].expand(queries.shape[:3])), shown)
        cos, sin = _mean_rotation(rotary, view.positions.amax((1, 2)).long() + 1, self.future)
        mean = _rotated(mean, cos, sin)
        if not self.covariance:
            return mean, None
        half = _rotated(covariance, cos[:, None], sin[:, None])  # C Rᵀ
        return mean, _rotated(half.mT, cos[:, None], sin[:, None])

    def _logits(self, view: View, mean: Tensor, covariance: Tensor | None) -> Tensor:
        """Step 3, [B, K, G, T]."""
        keys = view.keys.float()
        grouped = mean.unflatten(1, (keys.shape[1], -1))
        logits: Tensor = view.scaling * grouped @ keys.mT
        if covariance is not None:
            matrices = covariance.unflatten(1, (keys.shape[1], -1))
            spread = ((keys[:, :, None] @ matrices) * keys[:, :, None]).sum(-1)
            logits += view.scaling**2 / 2 * spread
        return logits


def _moments(queries: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, H, D] and covariance [B, H, D, D] of queries [B, H, n, D] where `shown` (bool [B, n]) says so."""
    count = shown.sum(-1).clamp(min=1)[:, None, None]
    inside = shown[:, None, :, None]
    mean = queries.masked_fill(~inside, 0.0).sum(2) / count
    centred = (queries - mean[:, :, None]).masked_fill(~inside, 0.0)
    return mean, centred.mT @ centred / count[..., None]


def _mean_rotation(rotary: Rotary, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean cosine and sine over the positions `start` [B] and the next ones, [B, 1, R/2] float32."""
    device = start.device
    places = start[:, None] + torch.arange(count, device=device)
    angles = places[..., None].double() * rotary.frequencies.to(device, torch.float64)
    cos, sin = (rotary.scaling * wave(angles).mean(1, keepdim=True) for wave in (torch.cos, torch.sin))
    return cos.float(), sin.float()


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors [B or 1, ..., D] with pairs of dimensions turned by cosines and sines [B, ..., R/2]."""
    pairs = cos.shape[-1]
    first, second, rest = vectors.split([pairs, pairs, vectors.shape[-1] - 2 * pairs], -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([*turned, rest.expand(*turned[0].shape[:-1], -1)], -1)


def _of_text(sample: Sample) -> dict[str, Tensor]:
    """Float32 `mean` [H, D] and `covariance` [H, D, D] of the queries of a text, before rotation."""
    if sample.rotary is None:
        raise ParameterError("the rotary embedding of the model is not known")
    count = sample.queries.shape[2]
    positions = torch.arange(count, device=sample.queries.device).expand(sample.queries.shape[:3])
    queries = sample.rotary.unrotate(sample.queries.double(), positions).transpose(0, 1).flatten(1, 2)[None]
    mean, covariance = _moments(queries, queries.new_ones(1, queries.shape[2], dtype=torch.bool))
    return {"mean": mean[0].float(), "covariance": covariance[0].float()}
