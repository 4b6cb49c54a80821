"""The built-in plugins pass what third parties are asked to pass."""

import itertools

import pytest

from kvpolicy.errors import PluginContractError
from kvpolicy.stages.conformance import Promises, check_plugin, conformance_cases
from kvpolicy_plugins import PLUGINS
from kvpolicy_plugins.allocators.adaptive import Adaptive
from kvpolicy_plugins.allocators.pyramid import Pyramid
from kvpolicy_plugins.pooling import Pool
from kvpolicy_plugins.scorers.attention import Attention
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.redundancy import Redundancy

VARIANTS = (
    *(kind() for kind in PLUGINS if kind is not History),
    History(Attention(4)),
    History(Redundancy(), "mean", scale="none", pool=Pool("max", 3)),
    *(Attention(5, group=group, group_at=at) for group, at in itertools.product(("max", "sum"), ("logits", "pooled"))),
    Attention(5, softmax="candidates", deviation=2, pool=Pool("average", 3), causal=False),
    Attention(1, shared=True),
    Redundancy(0.1, forgive=2, forgive_end="first", empty_row="none"),
    Adaptive(0, "mass"),
    Pyramid(0.3),
)
CASES = [
    pytest.param(check, id=f"{plugin.stage} {plugin.name} {number}: {name}")
    for number, plugin in enumerate(VARIANTS)
    for name, check in conformance_cases(plugin, Promises(gathers=True))
]


@pytest.mark.parametrize("check", CASES)
def test_built_in(check):
    check()


@pytest.mark.parametrize("plugin", [Pyramid(rounding="floor_step"), Adaptive(rounding="official")])
def test_the_published_roundings_overspend_or_underspend(plugin):
    with pytest.raises(PluginContractError, match=r"plugin '\w+' \(kvpolicy .*\): .* expected"):
        check_plugin(plugin)
