"""Scorer `q_filters`: the projection of keys on the direction that queries have in common."""

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Sample, Scorer, Site, View


@attrs.frozen
class QFilters(Scorer):
    """The projection of a key on the main direction of its head's queries (Q-Filters, section 3).

    Calibration, for each query head, of its post-RoPE queries Q [n, D] on a text:

    1. f = the first right singular vector of Q, with the sign in which the mean of <q, f> is positive;
    2. the filter of a KV head is the mean of f over its group, [K, D] float32.

    Score: <k, filter>, [B, K, T] float32. Queries lie along the filter, so keys that point against it get little
    attention. Published filters are stored with the opposite sign, and their projection is subtracted.
    """

    name: ClassVar[str] = "q_filters"
    reference: ClassVar[str] = "arXiv:2503.02812"

    @property
    def calibrated(self) -> bool:
        return True

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        return [{"filter": _filter_of(sample)} for sample in samples]

    def check_calibration(self, site: Site) -> None:
        super().check_calibration(site)
        expected = (site.geometry.kv_heads, site.geometry.head_dim)
        given = {name: tuple(tensor.shape) for name, tensor in site.calibration.items()}
        if given != {"filter": expected}:
            raise ParameterError(f"must be a filter of shape {expected}: {given}")

    def in_any_order(self) -> bool:
        return True

    def tile(self) -> str:
        return "reads a calibration"

    def score(self, view: View) -> Tensor:
        filters = view.calibration["filter"].to(torch.float32)
        projections: Tensor = (view.keys.float() @ filters[..., None])[..., 0]
        return projections


def _filter_of(sample: Sample) -> Tensor:
    """[K, D] float32."""
    queries = sample.queries.double().transpose(0, 1).flatten(1, 2)  # [H, S·T, D]
    main = torch.linalg.eigh(queries.mT @ queries).eigenvectors[..., -1]
    towards = (queries.mean(1) * main).sum(-1, keepdim=True)
    signed: Tensor = main * torch.where(towards < 0, -1.0, 1.0)
    mean: Tensor = signed.unflatten(0, (sample.geometry.kv_heads, -1)).mean(1)
    return mean.float()
