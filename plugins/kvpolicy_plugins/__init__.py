"""The built-in plugins: one published method a file, in plain torch. They come in as any third party's do."""

from kvpolicy.stages import Plugin, hookimpl
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.allocators.uniform_layers import UniformLayers
from kvpolicy_plugins.codecs.plain import Plain
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.readers.everything import Everything
from kvpolicy_plugins.scorers.accumulated_attention import AccumulatedAttention
from kvpolicy_plugins.scorers.attention import Attention
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.key_norm import KeyNorm
from kvpolicy_plugins.scorers.recency import Recency
from kvpolicy_plugins.scorers.redundancy import Redundancy
from kvpolicy_plugins.scorers.value_norm import ValueNorm
from kvpolicy_plugins.selectors.topk import TopK

PLUGINS: tuple[type[Plugin], ...] = (
    AccumulatedAttention,
    Attention,
    History,
    KeyNorm,
    Recency,
    Redundancy,
    ValueNorm,
    Pyramid,
    UniformLayers,
    Adaptive,
    UniformHeads,
    TopK,
    Drop,
    Plain,
    Everything,
)


@hookimpl
def kvpolicy_stages() -> tuple[type[Plugin], ...]:
    """Every built-in plugin."""
    return PLUGINS


@hookimpl
def kvpolicy_policies() -> list[str]:
    """The package of the built-in policies."""
    return ["kvpolicy_policies"]
