"""Lower bounds on the time of a compression: memory traffic at the rate of a copy, and the products of the scores."""

from statistics import median

import attrs
import torch
from torch import Tensor

from kvpolicy.bench.baselines.naive import LayerTensors
from kvpolicy.bench.protocol.clock import Call
from kvpolicy.bench.protocol.interleave import Samples, Variant
from kvpolicy.plan.explain.reads import reads_of
from kvpolicy.plan.plan import Plan

COPY, GEMM = "copy", "library gemm"
LARGE = {"cpu": 128 * 2**20, "cuda": 2**30}  # bytes of the buffer that is copied


@attrs.frozen
class Floors:
    """Bytes and products of one sample; the rates are timed in the same rounds as the variants."""

    moved: int  # bytes of one sample
    window: int  # W, 0 when no product with queries is needed
    layers: tuple[LayerTensors, ...]

    @classmethod
    def of(cls, plan: Plan, layers: list[LayerTensors], kept: int) -> "Floors":
        """Keys and values once if a scorer reads them; rows that take the place of others read and written."""
        read = {name for term in plan.spec.score for name in reads_of(term.scorer, plan.geometry).columns}
        shape = layers[0].keys.shape
        row = layers[0].keys.element_size() * shape[0] * shape[1] * shape[3]
        moving = min(kept, shape[2] - kept)
        scanned = sum(name in read for name in ("keys", "values")) * shape[2]
        return cls(len(layers) * row * (scanned + 2 * 2 * moving), plan.needs.queries, tuple(layers))

    def variants(self) -> list[Variant]:
        """A large copy; and, by the library, the products of all window queries with all keys."""
        products = [Variant(GEMM, self._products)] if self.window else []
        return [copy_of(self.layers[0].keys), *products]

    def seconds(self, samples: Samples) -> dict[str, float]:
        """The floors that the samples of these variants give, for one sample."""
        seconds = {"bytes": self.moved / bandwidth_of(samples, self.layers[0].keys)}
        return {**seconds, "gemm": median(samples[GEMM])} if self.window else seconds

    def _products(self) -> Call:
        pairs = [_operands(layer) for layer in self.layers]
        outputs = [torch.bmm(*pair) for pair in pairs]

        def multiply() -> None:
            for pair, output in zip(pairs, outputs, strict=True):
                torch.bmm(*pair, out=output)

        return multiply


def copy_of(like: Tensor) -> Variant:
    """The copy of a buffer too large for any cache, of the dtype and on the device of a tensor."""
    size = LARGE[like.device.type] // like.element_size()
    source = torch.randn(size, device=like.device, dtype=torch.float32).to(like.dtype)
    target = torch.empty_like(source)
    return Variant.repeated(COPY, lambda: target.copy_(source))


def bandwidth_of(samples: Samples, like: Tensor) -> float:
    """Bytes a second, read and written, that the samples of that copy show."""
    return 2 * LARGE[like.device.type] / median(samples[COPY])


def _operands(layer: LayerTensors) -> tuple[Tensor, Tensor]:
    """[B·K, G·W, D] and [B·K, D, T]."""
    rows, heads, _, dim = layer.keys.shape
    queries = layer.queries.reshape(rows * heads, -1, dim)
    return queries, layer.keys.reshape(rows * heads, -1, dim).transpose(1, 2)
