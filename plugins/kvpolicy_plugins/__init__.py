"""The built-in plugins: one published method per file, in plain torch. They are loaded like those of third parties."""

from kvpolicy.stages import Plugin, hookimpl
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.cake import Cake
from kvpolicy_plugins.allocators.duo import Duo
from kvpolicy_plugins.allocators.global_ranking import GlobalRanking
from kvpolicy_plugins.allocators.headkv import HeadKV
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.allocators.surfacelogic import SurfaceLogic
from kvpolicy_plugins.allocators.threshold import Threshold
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.allocators.uniform_layers import UniformLayers
from kvpolicy_plugins.codecs.fp8 import Fp8
from kvpolicy_plugins.codecs.kivi import Kivi
from kvpolicy_plugins.codecs.latent import Latent
from kvpolicy_plugins.codecs.nova_vq import NovaVQ
from kvpolicy_plugins.codecs.plain import Plain
from kvpolicy_plugins.codecs.rotation import Rotation
from kvpolicy_plugins.codecs.tada import Tada
from kvpolicy_plugins.codecs.turboquant import TurboQuant
from kvpolicy_plugins.mergers.attention_matching import AttentionMatching
from kvpolicy_plugins.mergers.cam import CaM
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.drop import Drop
from kvpolicy_plugins.mergers.keepkv import KeepKV
from kvpolicy_plugins.mergers.kvmerger import KVMerger
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.weightedkv import WeightedKV
from kvpolicy_plugins.mergers.window_fit import WindowFit
from kvpolicy_plugins.readers.chunk_topk import ChunkTopK
from kvpolicy_plugins.readers.everything import Everything
from kvpolicy_plugins.readers.latent_topk import LatentTopK
from kvpolicy_plugins.readers.pages import Pages
from kvpolicy_plugins.scorers.attention_based.accumulated_attention import AccumulatedAttention
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_based.chunk_attention import ChunkAttention
from kvpolicy_plugins.scorers.attention_based.expected_attention import ExpectedAttention
from kvpolicy_plugins.scorers.attention_based.q_filters import QFilters
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from kvpolicy_plugins.scorers.attention_based.triattention import TriAttention
from kvpolicy_plugins.scorers.attention_free.cur import Cur
from kvpolicy_plugins.scorers.attention_free.frame_value_norm import FrameValueNorm
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from kvpolicy_plugins.scorers.attention_free.learned_gate import LearnedGate
from kvpolicy_plugins.scorers.attention_free.leverage import Leverage
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.attention_free.value_norm import ValueNorm
from kvpolicy_plugins.scorers.by_region import ByRegion
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.random_draw import RandomDraw
from kvpolicy_plugins.scorers.recency import Recency
from kvpolicy_plugins.selectors.chunks import Chunks
from kvpolicy_plugins.selectors.critical import Critical
from kvpolicy_plugins.selectors.fair import Fair
from kvpolicy_plugins.selectors.kvcrush import KVCrush
from kvpolicy_plugins.selectors.mass_segments import MassSegments
from kvpolicy_plugins.selectors.omp import OMP
from kvpolicy_plugins.selectors.sample import Sample
from kvpolicy_plugins.selectors.temporal_redundancy import TemporalRedundancy
from kvpolicy_plugins.selectors.topk import TopK
from kvpolicy_plugins.selectors.whitelist import Whitelist

PLUGINS: tuple[type[Plugin], ...] = (
    AccumulatedAttention,
    Attention,
    ByRegion,
    ChunkAttention,
    Cur,
    ExpectedAttention,
    FrameValueNorm,
    History,
    KeyDiff,
    KeyNorm,
    LagKV,
    LearnedGate,
    Leverage,
    QFilters,
    RandomDraw,
    Recency,
    Reconstruction,
    Redundancy,
    TriAttention,
    ValueNorm,
    Pyramid,
    UniformLayers,
    Adaptive,
    Threshold,
    UniformHeads,
    Cake,
    Duo,
    GlobalRanking,
    HeadKV,
    SurfaceLogic,
    Chunks,
    Critical,
    Fair,
    KVCrush,
    MassSegments,
    OMP,
    Sample,
    TemporalRedundancy,
    TopK,
    Whitelist,
    AttentionMatching,
    CaM,
    D2O,
    Drop,
    KeepKV,
    KVMerger,
    Pivot,
    ToMe,
    Weighted,
    WeightedKV,
    WindowFit,
    Fp8,
    Kivi,
    Latent,
    NovaVQ,
    Plain,
    Rotation,
    Tada,
    TurboQuant,
    ChunkTopK,
    Everything,
    LatentTopK,
    Pages,
)


@hookimpl
def kvpolicy_stages() -> tuple[type[Plugin], ...]:
    """Every built-in plugin."""
    return PLUGINS


@hookimpl
def kvpolicy_policies() -> list[str]:
    """The package of the built-in policies."""
    return ["kvpolicy_policies"]
