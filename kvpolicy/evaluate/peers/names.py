"""Which caches of other libraries can be measured."""

from collections.abc import Sequence
from typing import Final

import attrs

from kvpolicy.errors import InputError, did_you_mean, shown

ALL: Final = "all"  # in place of a name
KVPRESS, TRANSFORMERS = "kvpress", "transformers"


@attrs.frozen
class Peer:
    """A cache of another library."""

    name: str
    library: str
    summary: str
    shared: bool = True  # whether it is asked for a share of the full cache; others hold what they hold

    @property
    def label(self) -> str:
        """`"kvpress snapkv"`: its name in records, which no policy of ours has."""
        return f"{self.library} {self.name}"


# The first shows what another process and another release of transformers alone change.
REFERENCE: Final = Peer(
    "full", TRANSFORMERS, "full cache of the release of transformers that peers run on", shared=False
)

PEERS: Final = {
    peer.name: peer
    for peer in (
        REFERENCE,
        Peer("snapkv", KVPRESS, "SnapKVPress, window 64"),
        Peer("adakv", KVPRESS, "AdaKVPress of that; masks what it removes and holds it"),
        Peer("tova", KVPRESS, "TOVAPress"),
        Peer("expected_attention", KVPRESS, "ExpectedAttentionPress"),
        Peer("keydiff", KVPRESS, "KeyDiffPress"),
        Peer("kvzip", KVPRESS, "KVzipPress; reads the prompt again, masks what it removes and holds it"),
        Peer("streaming_llm", KVPRESS, "StreamingLLMPress"),
        Peer("quanto4", TRANSFORMERS, "QuantizedCache, quanto, 4 bits", shared=False),
        Peer("quanto2", TRANSFORMERS, "QuantizedCache, quanto, 2 bits", shared=False),
        Peer("hqq4", TRANSFORMERS, "QuantizedCache, hqq, 4 bits", shared=False),
        Peer("hqq2", TRANSFORMERS, "QuantizedCache, hqq, 2 bits", shared=False),
    )
}


def peers_of(names: Sequence[str]) -> tuple[Peer, ...]:
    """The peers of those names, or all, each once and behind their own full cache. Raises InputError."""
    if not names:
        return ()
    chosen = list(PEERS) if ALL in names else names
    for name in chosen:
        if name not in PEERS:
            raise InputError(f"--peer: unknown: {shown(name)}{did_you_mean(name, (ALL, *PEERS), 'known')}")
    return tuple(PEERS[name] for name in dict.fromkeys((REFERENCE.name, *chosen)))
