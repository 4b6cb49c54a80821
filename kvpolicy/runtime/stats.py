"""What happened in each layer while a sequence ran: plain numbers that outlive the cache."""

import attrs


@attrs.define
class LayerStats:
    """Counts of one managed layer. Entries are per KV head, averaged over rows and heads."""

    layer: int  # index within the model
    seen: int = 0  # tokens, pads included
    held: float = 0.0
    nbytes: int = 0
    peak_bytes: int = 0
    compressions: int = 0
    seconds: float = 0.0  # host time spent compressing

    def sample(self, seen: int, held: float, nbytes: int) -> None:
        """Note the present state."""
        self.seen, self.held, self.nbytes = seen, held, nbytes
        self.peak_bytes = max(self.peak_bytes, nbytes)
