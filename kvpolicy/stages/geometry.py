"""The geometry of a model: the shapes that matter for its KV cache."""

import attrs

from kvpolicy.errors import UnsupportedModelError


@attrs.frozen
class Geometry:
    """Shapes of the layers that a policy manages. H = `query_heads`, K = `kv_heads`, G = H / K, D = `head_dim`.

    `managed` are the indices, within the model, of the layers with full attention; `layers` counts them. Layers
    with a sliding window keep the cache of transformers: `windows` are their sizes in tokens, one per layer.
    """

    managed: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not self.managed or min(self.query_heads, self.kv_heads, self.head_dim) < 1:
            raise UnsupportedModelError(f"no attention layer that a policy can manage: {self}")
        if self.query_heads % self.kv_heads:
            raise UnsupportedModelError(f"{self.query_heads} query heads cannot share {self.kv_heads} KV heads evenly")

    @property
    def layers(self) -> int:
        """L, the number of managed layers."""
        return len(self.managed)

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.query_heads // self.kv_heads
