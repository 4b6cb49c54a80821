"""The first prompt and the regions of each row, and which of their entries are protected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.cache.request.regions import Regions
from kvpolicy.cache.state_contents import Contents, Described, counts_of
from kvpolicy.errors import RegionError
from kvpolicy.spec.policy import Protect

Interval = tuple[int, int]


class RequestSpans:
    """Spans of the requests in a cache, shared by its layers, as positions, which entries keep when they move."""

    def __init__(self, protect: Protect, regions: Regions | None = None, read: Sequence[str] = ()) -> None:
        """Raises RegionError if the policy protects a region that is not given, or a plugin reads one (`read`)."""
        self.protect = protect
        self._given, self._read = regions, tuple(read)
        named = tuple(dict.fromkeys((*protect.regions, *read)))
        if regions is not None:
            regions.require(named)
        elif named:
            raise RegionError(
                f"the policy names regions ({', '.join(named)}), but none is given: attachment.cache(regions=...)"
            )
        self.clear()

    def clear(self) -> None:
        """Remove all rows: the cache has been emptied."""
        self.regions = self._given
        self.prompt: list[int] = []  # tokens of each row's first prompt so far
        self._prompt_is_over = False
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._labels: Tensor | None = None
        self._starts: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors kept for all layers."""
        return [table for table in (self._labels, self._starts) if table is not None]

    def begin(self, rows: int) -> None:
        """Set the number of rows. Raises RegionError, before any change, if the regions do not match it."""
        if self.regions is not None and len(self.regions.rows) != rows:
            self.regions = self.regions.for_rows(rows)

    def add(self, regions: Regions, rows: int) -> None:
        """Add spans to those of the `rows` rows. Raises RegionError, before any change, as `Regions.joined` does."""
        more = regions.for_rows(rows)
        self.regions = more if self.regions is None else self.regions.joined(more)
        self._forget_tables()

    def note_prompt(self, num_tokens: Sequence[int], *, over: bool) -> None:
        """Set the tokens of each row's prompt, and whether it is complete (`over`); later prompts are ignored."""
        if not self._prompt_is_over:
            self.prompt = list(num_tokens)
        self._prompt_is_over = self._prompt_is_over or over

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in that order."""
        self.prompt = [self.prompt[row] for row in rows] if self.prompt else []
        self._forget_tables()
        if self.regions is not None:
            self.regions = self.regions.select(rows)

    def go_on_as(self, other: "RequestSpans", rows: Sequence[int]) -> None:
        """Copy the prompts of the given rows of another cache; this one was made with the regions of these rows."""
        self.prompt = [other.prompt[row] for row in rows] if other.prompt else []
        self._prompt_is_over = other._prompt_is_over  # noqa: SLF001 - of its own class

    def describe(self) -> Described:
        """State without the regions: tokens of the first prompts, [B] or [0], and whether the prompt is complete."""
        yield "prompt", counts_of(self.prompt)
        yield "prompt_is_over", self._prompt_is_over

    def restore(self, contents: Contents, rows: int) -> None:
        """Restore the state of `rows` rows; this object was made with the regions of these rows."""
        self.prompt = contents.counts("prompt", (rows if contents.size("prompt") else 0,))
        self._prompt_is_over = contents.flag("prompt_is_over")
        if self._prompt_is_over and not self.prompt:
            raise contents.wrong("prompt", "must have a number per row once the prompt is complete")
        self.begin(rows)

    def protected(self, row: int, tokens: int, sinks: int, recent: int) -> int:
        """How many of the first `tokens` tokens of a row are protected, including sinks and recent ones."""
        spans = [(0, sinks), (max(0, tokens - recent), tokens), *self._protected(row)]
        return _covered([(start, min(stop, tokens)) for start, stop in spans])

    def protected_tokens(self, row: int, tokens: int, sinks: int, recent: int) -> Tensor:
        """Which of the first `tokens` tokens of a row are protected, bool [tokens] in host memory."""
        protected = torch.zeros(tokens, dtype=torch.bool)
        for start, stop in [(0, sinks), (max(0, tokens - recent), tokens), *self._protected(row)]:
            protected[start:stop] = True
        return protected

    def _protected(self, row: int) -> list[Interval]:
        spans = []
        if self.protect.prompt and self.prompt:
            spans.append((0, self.prompt[row]))
        if self.regions is not None and self.protect.regions:
            wanted = {number for number, name in enumerate(self.regions.names, 1) if name in self.protect.regions}
            spans += [(start, stop) for number, start, stop in self.regions.rows[row] if number in wanted]
        return spans

    def pinned(self, positions: Tensor, rows: Sequence[int]) -> Tensor | None:
        """Slots with protected entries of the prompt or regions: bool [rows, K, T] for `positions`; None = none."""
        if not self.protect.by_place:
            return None
        pinned = torch.zeros_like(positions, dtype=torch.bool)
        if self.protect.prompt and self.prompt:
            ends = torch.tensor([self.prompt[row] for row in rows], device=positions.device)
            pinned |= positions < ends[:, None, None]
        regions = self.of(positions, rows)
        if regions is not None and self.regions is not None:
            for name in self.protect.regions:
                pinned |= regions == self.regions.names.index(name) + 1
        return pinned & (positions >= 0)

    def of(self, positions: Tensor, rows: Sequence[int]) -> Tensor | None:
        """Region numbers, int8 [rows, K, T], 0 for entries outside regions; None if the cache has no regions."""
        if self.regions is None:
            return None
        labels = self._on(positions.device)[list(rows)]
        outside = labels.shape[1] - 1
        columns = positions.long().clamp(-1, outside)
        columns = columns.masked_fill(columns < 0, outside)
        return labels.gather(1, columns.flatten(1)).view(positions.shape)

    def starts(self, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """Region number and first position of each span, int32 [rows, S, 2], 0 behind a row's last.

        Spans may be given that have not come yet. None = there are no regions, or no plugin reads them.
        """
        if self.regions is None or not self._read:
            return None
        if self._starts is None or self._starts.device != device:
            most = max(1, *map(len, self.regions.rows))
            spans = [[span[:2] for span in row] + [(0, 0)] * (most - len(row)) for row in self.regions.rows]
            self._starts = torch.tensor(spans, dtype=torch.int32, device=device)
        return self._starts[list(rows)]

    def _on(self, device: torch.device) -> Tensor:
        """int8 [B, n + 1]: region numbers of the first n positions, then 0 for all other positions."""
        regions = self.regions
        if regions is None:
            raise RegionError("the cache has no regions")
        if self._labels is None or self._labels.device != device:
            longest = max((stop for row in regions.rows for _, _, stop in row), default=0)
            labels = torch.zeros(len(regions.rows), longest + 1, dtype=torch.int8)
            for row, spans in enumerate(regions.rows):
                for number, start, stop in spans:
                    labels[row, start:stop] = number
            self._labels = labels.to(device)
        return self._labels


def _covered(intervals: Sequence[Interval]) -> int:
    """How many numbers are in at least one of the intervals."""
    count, end = 0, 0
    for start, stop in sorted(intervals):
        count += max(0, stop - max(start, end))
        end = max(end, stop)
    return count
