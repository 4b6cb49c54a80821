"""One pass of each of some rows, as a batch: what is forwarded, and which entries its queries are shown."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kvpolicy.stages import Pass
from kvpolicy.stages.slots import indices_of

_ANYWHERE = (0, torch.iinfo(torch.int32).max)


@attrs.frozen(eq=False)
class PassBatch:
    """The passes of some of B rows behind the tokens that these have; the others, and shorter ones, are padded."""

    tokens: Tensor  # int64 [B, m]; 0 in pads, which come last
    real: Tensor  # bool [B, m]
    positions: Tensor  # int32 [B, m], places among the row's tokens; -1 = pad
    padded: bool  # whether there is a pad
    reads: Tensor  # bool [B], rows that have a pass
    spans: Tensor | None  # int32 [B, S, 2], positions of the entries that are shown; None = all

    @classmethod
    def of(cls, passes: Mapping[int, Pass], num_tokens: Sequence[int], device: torch.device) -> "PassBatch":
        """The passes by row, each at least a token long; `num_tokens` are the tokens of all rows."""
        rows, lengths = len(num_tokens), [0] * len(num_tokens)
        longest = max(own_pass.tokens.shape[0] for own_pass in passes.values())
        tokens = torch.zeros(rows, longest, dtype=torch.int64)
        for row, own_pass in passes.items():
            lengths[row] = own_pass.tokens.shape[0]
            tokens[row, : lengths[row]] = own_pass.tokens
        places = torch.arange(longest)
        real = places < torch.tensor(lengths)[:, None]
        positions = (torch.tensor(num_tokens)[:, None] + places).masked_fill(~real, -1).to(torch.int32)
        return cls(
            tokens=tokens.to(device),
            real=real.to(device),
            positions=positions.to(device),
            padded=min(lengths) < longest,
            reads=torch.tensor([row in passes for row in range(rows)], device=device),
            spans=_spans(passes, rows, device),
        )

    @property
    def count(self) -> int:
        """Tokens of the longest pass, m."""
        return self.tokens.shape[1]

    def of_row(self, row: int) -> "PassBatch":
        """That of one row."""
        at = slice(row, row + 1)
        spans = None if self.spans is None else self.spans[at]
        real, reads = self.real[at], self.reads[at]
        return attrs.evolve(
            self, tokens=self.tokens[at], real=real, positions=self.positions[at], reads=reads, spans=spans
        )

    def slots(self, positions: Tensor) -> Tensor | None:
        """Slots that are shown of entries at positions [B, K, T]: int64 [B, K, n], ascending, -1 behind; None = all."""
        if self.spans is None:
            return None
        held = positions[:, :, :, None]
        first, behind = (self.spans[:, None, None, :, side] for side in (0, 1))
        return indices_of(((held >= first) & (held < behind)).any(-1))


def _spans(passes: Mapping[int, Pass], rows: int, device: torch.device) -> Tensor | None:
    if all(own_pass.spans is None for own_pass in passes.values()):
        return None
    listed = [_listed(passes.get(row)) for row in range(rows)]
    most = max(map(len, listed))
    padded = [[*spans, *[(0, 0)] * (most - len(spans))] for spans in listed]
    return torch.tensor(padded, dtype=torch.int32, device=device).reshape(rows, most, 2)


def _listed(own_pass: Pass | None) -> list[tuple[int, int]]:
    if own_pass is None:
        return []
    return [_ANYWHERE] if own_pass.spans is None else list(own_pass.spans)
