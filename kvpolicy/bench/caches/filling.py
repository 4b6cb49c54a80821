"""Cache layers filled without a model: what a forward would do to them, its attention left out."""

from torch import Tensor

from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer


def feed(layer: PolicyLayer, keys: Tensor, values: Tensor, queries: Tensor) -> None:
    """One forward of a layer: keys and values [B, K, q, D], and the newest of its queries, [B, H, at most q, D]."""
    layer.finish_forward(appended(layer, keys, values, queries))


def appended(layer: PolicyLayer, keys: Tensor, values: Tensor, queries: Tensor) -> QueryBatch:
    """The same up to where the layer observes and compresses; give the result to `finish_forward` for that."""
    layer.update(keys, values)
    positions = layer.place_tokens(None)[:, -queries.shape[2] :]
    return QueryBatch(queries, positions, padded=False, scaling=keys.shape[-1] ** -0.5)
