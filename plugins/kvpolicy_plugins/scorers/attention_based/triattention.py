"""Scorer `triattention`: the attention that calibrated queries would give at distances to come."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Choice, Flag, Integer, Needs, Rotary, Sample, Scorer, Site, View, parameter
from kvpolicy.stages.standardise import standardised
from kvpolicy_plugins.shared.gqa_group import reduce_group


@attrs.frozen
class TriAttention(Scorer):
    """Logits that queries with calibrated statistics would give keys at distances to come (TriAttention).

    Dimensions j and j + R/2 of a vector before rotation are one complex number q_f, f = 1 .. R/2, with frequency w_f.

    1. Calibration on a text, for each query head: mu_f = mean of q_f, nu_f = mean of |q_f|, [H, R/2]; the mean of
       dimensions that are not rotated, [H, D - R];
    2. with d = 1, 2, 4, .. up to `furthest`, and n the next position of the row, the logit that a mean query at n + d
       gives a key, its mean (or largest value) over d: Re sum of mu_f e^(i (n + d) w_f) conj(k_f), k_f the key as it is
       cached, [B, H, T]. The mean over d is taken of the queries, so that it costs one product with the keys;
    3. `norm_term` adds the sum of (nu_f - |mu_f|) |k_f|: what the length of queries says beyond their mean;
    4. scores of a query head to mean 0 and deviation 1 over its candidates, then `group` over the heads of a KV head.

    No query is observed. The published runner averages step 4 over all layers, so that heads with one number keep the
    same entries in all layers, and adds random numbers against ties; here layers decide for themselves.
    """

    name: ClassVar[str] = "triattention"
    reference: ClassVar[str] = "arXiv:2604.04921"
    calibrated_by: ClassVar[tuple[str, ...]] = ()

    furthest: int = parameter(Integer(minimum=1, maximum=2**20), 2**16, help="the largest distance that is looked at")
    over: str = parameter(Choice(("mean", "max")), "mean", help="how distances are reduced to one")
    norm_term: bool = parameter(Flag(), True, help="add what the length of queries says beyond their mean")
    group: str = parameter(Choice(("max", "mean")), "max", help="how the query heads of a KV head are reduced to one")

    def needs(self) -> Needs:
        return Needs(rotary=True)

    @property
    def calibrated(self) -> bool:
        return True

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        return [_statistics(sample) for sample in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        if site.rotary is None:
            raise ParameterError("the rotary embedding of the model is not known")
        heads, pairs = site.geometry.query_heads, site.rotary.frequencies.shape[0]
        shapes = {"real": pairs, "imaginary": pairs, "length": pairs, "rest": site.geometry.head_dim - 2 * pairs}
        expected = {name: (heads, size) for name, size in shapes.items()}
        given = {name: tuple(tensor.shape) for name, tensor in site.calibration.items()}
        if given != expected:
            raise ParameterError(f"must be statistics of shapes {expected}: {given}")

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "reads a calibration"

    def score(self, view: View) -> Tensor:
        logits = self.logits(view)
        inside = view.candidates[:, :, None].expand(logits.shape)
        return reduce_group(standardised(logits, inside), self.group).squeeze(2)

    def logits(self, view: View) -> Tensor:
        """Steps 2 and 3, [B, K, G, T] float32."""
        rotary = view.rotary
        if rotary is None:
            raise ValueError("this view has no rotary embedding")
        keys, pairs = view.keys.float(), rotary.frequencies.shape[0]
        queries = self._future_queries(view, rotary).unflatten(1, (keys.shape[1], -1))  # [B, K, G, d, D]
        products = (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])
        logits: Tensor = products.mean(3) if self.over == "mean" else products.amax(3)
        if not self.norm_term:
            return logits
        spare = view.calibration["length"] - _absolute(view.calibration["real"], view.calibration["imaginary"])
        lengths = _absolute(keys[..., :pairs], keys[..., pairs : 2 * pairs])
        grouped = spare.clamp(min=0).float().unflatten(0, (keys.shape[1], -1)) * rotary.scaling
        logits += grouped @ lengths.mT
        return logits

    def _future_queries(self, view: View, rotary: Rotary) -> Tensor:
        """Mean queries at the distances to come, [B, H, d, D] float32; one, their mean, where that is enough."""
        statistics, device = view.calibration, view.keys.device
        distances = 2.0 ** torch.arange(self.furthest.bit_length(), dtype=torch.float64, device=device)
        places = view.positions.amax((1, 2)).double()[:, None] + 1 + distances  # float64: angles of far positions
        angles = places[..., None] * rotary.frequencies.to(device, torch.float64)  # [B, d, R/2]
        cos, sin = (rotary.scaling * wave(angles) for wave in (torch.cos, torch.sin))
        if self.over == "mean":
            cos, sin = cos.mean(1, keepdim=True), sin.mean(1, keepdim=True)
        real, imaginary = (statistics[name].double()[:, None] for name in ("real", "imaginary"))
        cos, sin = cos[:, None], sin[:, None]
        rest = statistics["rest"].double()[:, None].expand(len(places), -1, cos.shape[2], -1)
        rotated = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin, rest], -1)
        return rotated.float()


def _absolute(real: Tensor, imaginary: Tensor) -> Tensor:
    return (real.float().square() + imaginary.float().square()).sqrt()


def _statistics(sample: Sample) -> dict[str, Tensor]:
    """Float32 `real`, `imaginary` and `length` [H, R/2], and `rest` [H, D - R]."""
    if sample.rotary is None:
        raise ParameterError("the rotary embedding of the model is not known")
    positions = torch.arange(sample.queries.shape[2], device=sample.queries.device).expand(sample.queries.shape[:3])
    queries = sample.rotary.unrotate(sample.queries.float(), positions).transpose(0, 1).flatten(1, 2)  # [H, S·T, D]
    pairs = sample.rotary.frequencies.shape[0]
    real, imaginary = queries[..., :pairs], queries[..., pairs : 2 * pairs]
    columns = {
        "real": real,
        "imaginary": imaginary,
        "length": _absolute(real, imaginary),
        "rest": queries[..., 2 * pairs :],
    }
    return {name: column.double().mean(1).float() for name, column in columns.items()}
