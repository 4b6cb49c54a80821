"""What happened in each layer while a sequence ran: plain numbers that outlive the cache."""

import attrs


@attrs.define
class LayerStats:
    """Counts of one managed layer. Entries are per KV head, averaged over rows and heads."""

    layer: int  # index within the model
    seen: int = 0  # tokens, pads included
    held: float = 0.0
    read: float = 0.0  # entries that the newest query of a row attended to, averaged over decode steps
    decode_steps: int = 0
    nbytes: int = 0
    peak_bytes: int = 0
    compressions: int = 0
    seconds: float = 0.0  # host time spent compressing

    def sample(self, seen: int, held: float, nbytes: int) -> None:
        """Note the present state."""
        self.seen, self.held, self.nbytes = seen, held, nbytes
        self.peak_bytes = max(self.peak_bytes, nbytes)

    def read_by_step(self, entries: float) -> None:
        """Note how many entries a decode step attends to."""
        self.decode_steps += 1
        self.read += (entries - self.read) / self.decode_steps
