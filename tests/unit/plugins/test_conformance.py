"""The built-in plugins pass what third parties are asked to pass."""

import itertools

import pytest

from kvpolicy.errors import PluginContractError
from kvpolicy.stages.conformance import Promises, check_plugin, conformance_cases
from kvpolicy_plugins import PLUGINS
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.duo import Duo
from kvpolicy_plugins.allocators.headkv import HeadKV
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.allocators.surfacelogic import SurfaceLogic
from kvpolicy_plugins.allocators.threshold import Threshold
from kvpolicy_plugins.mergers.attention_matching import AttentionMatching
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.window_fit import WindowFit
from kvpolicy_plugins.readers.chunk_topk import ChunkTopK
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_based.q_filters import QFilters
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from kvpolicy_plugins.scorers.attention_free.cur import Cur
from kvpolicy_plugins.scorers.attention_free.frame_value_norm import FrameValueNorm
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from kvpolicy_plugins.scorers.attention_free.learned_gate import LearnedGate
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.by_region import ByRegion
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.random_draw import RandomDraw
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.selectors.temporal_redundancy import TemporalRedundancy

VARIANTS = (
    *(kind() for kind in PLUGINS if kind not in (ByRegion, History, Threshold)),
    ByRegion(ByRegion(Attention(4), "thinking", share=0), "tools", half_life=5),
    ByRegion(History(KeyNorm()), "tools", 0.3),
    History(Attention(4)),
    History(QFilters()),
    History(Reconstruction()),
    History(Redundancy(), "mean", scale="none", pool=Pool("max", 3)),
    Attention(5, by_length=True, group="max", group_at="pooled"),
    *(Attention(5, group=group, group_at=at) for group, at in itertools.product(("max", "sum"), ("logits", "pooled"))),
    Attention(5, softmax="candidates", deviation=2, pool=Pool("average", 3), causal=False),
    Attention(1, shared=True),
    Redundancy(0.1, forgive=2, forgive_end="first", empty_row="none"),
    LearnedGate("rotated", 3, 0),
    LagKV(1, 4),
    LagKV(0, 3, cross=True),
    Cur("average", window=5),
    Cur(rank=6, window=0),
    *(FrameValueNorm(rows, 2, pool=pool) for rows, pool in ((1, "1d"), (2, "2d"), (2, "3d"))),
    *(FrameValueNorm(3, 3, pool=pool) for pool in ("2d", "depth")),
    TemporalRedundancy(2, 0.5),
    TemporalRedundancy(3, 1, 0.1),
    TemporalRedundancy(1, 0, 1),
    Adaptive(0, "mass"),
    *(Threshold(value) for value in (-1e9, 4.0, 1e9)),
    Pyramid(0.3),
    Duo(needle=3, group="max", streaming=0.9),
    HeadKV(needle=1, beta=2, exponent=0.5),
    SurfaceLogic(top=1, beta=1e6),
    *(KeepKV(-1, key=key) for key in ("scale", "bias", "mean")),
    KeepKV(0.5, alpha=0, fallback="bias"),
    KeepKV(-1, estimate="window", window=3, key="additive", gqa="lstsq"),
    AttentionMatching(ridge=0, bound=20, iterations=0),
    AttentionMatching(queries=2),
    Attention(5, softmax="candidates", reduce="rms", group="rms"),
    Attention(5, reduce="max", group="max"),
    WindowFit("ward"),
    WindowFit(values="solve", queries=2),
    ChunkTopK(1, 1.0, 7),
    ChunkTopK(5, 0.1, 699, dense_first=1),
    WindowFit(threshold=0.1, attended=0, queries=3),
)
# Of the codecs with their default parameters; random vectors have no latent of a lower rank.
ERRORS = {"fp8": 0.04, "kivi": 0.08, "latent": 1.5, "nova_vq": 1.0, "rotation": 0.25, "tada": 0.1, "turboquant": 0.25}
CASES = [
    pytest.param(check, id=f"{plugin.stage} {plugin.name} {number}: {name}")
    for number, plugin in enumerate(VARIANTS)
    for name, check in conformance_cases(
        plugin,
        Promises(
            # Each head draws for itself, or is calibrated for itself, whatever it holds.
            heads_apart=not isinstance(plugin, RandomDraw) and not plugin.calibrated,
            gathers=isinstance(plugin, Drop),
            error=ERRORS.get(plugin.name, 0.0),
        ),
    )
]


@pytest.mark.parametrize("check", CASES)
def test_built_in(check):
    check()


@pytest.mark.parametrize(
    "plugin", [Pyramid(rounding="floor_step"), Adaptive(rounding="official"), HeadKV(rounding="official")]
)
def test_the_published_roundings_overspend_or_underspend(plugin):
    with pytest.raises(PluginContractError, match=r"plugin '\w+' \(kvpolicy .*\): .* expected"):
        check_plugin(plugin)
