"""What an explanation counts: steps of a compression, and the lengths that their bytes follow from."""

import attrs

from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.registry.plugins import registry
from kvpolicy_kernels import Traffic

REFERENCE = "reference"
FUSED = "fused"


@attrs.frozen
class Step:
    """One step of a compression. `read` and `written` are bytes for one layer and one sequence."""

    stage: str
    plugin: str
    read: int
    written: int
    columns: tuple[str, ...] = ()  # what is read
    implementation: str = REFERENCE
    reason: str = ""  # why it is not fused, or what could not be found out
    launches: int = 0  # of kernels; one launch serves all layers of a decode step

    @classmethod
    def fused(cls, stage: str, plugin: str, traffic: Traffic, reason: str = "") -> "Step":
        """A step whose kernels address the bytes that are stated."""
        read, written = sum(traffic.read.values()), sum(traffic.written.values())
        return cls(stage, plugin, read, written, tuple(traffic.read), FUSED, reason, traffic.launches)


@attrs.frozen
class Shapes:
    """The lengths that the bytes follow from, in entries per KV head."""

    held: int  # T, when the compression starts
    kept: int  # N
    new: int  # tokens since the last compression
    forwards: tuple[int, ...]  # entries held at each forward since then: one a token, or one for a prompt
    protected: tuple[int, int] = (0, 0)  # sinks and recent ones among them


def name_of(plugin: Plugin) -> str:
    """The name under which a policy file uses a plugin."""
    return registry().reference(type(plugin))
