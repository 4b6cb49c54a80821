"""Tokens that may be undone: candidates of assisted decoding are taken one by one, as in decoding alone.

An eviction that decoding alone would make between two candidates is made between them, so that later ones are verified
on what it leaves. What was done to the newest token of all (observing it, compressing behind it) waits until another
one follows, or until `crop`.
"""

from collections.abc import Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor

from kvpolicy.cache.layer_state import LayerState
from kvpolicy.cache.query_batch import QueryBatch


@attrs.frozen(eq=False)
class RecordedTokens:
    """Tokens that a layer has taken."""

    keys: Tensor  # [B, K, q, D]
    values: Tensor
    batch: QueryBatch

    @property
    def count(self) -> int:
        """How many they are, q."""
        return self.keys.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values, queries and their positions."""
        return self.keys, self.values, self.batch.queries, self.batch.positions

    def part(self, start: int, stop: int) -> "RecordedTokens":
        """Some of the tokens."""
        batch = self.batch.first(stop).newest(stop - start)
        return RecordedTokens(self.keys[:, :, start:stop], self.values[:, :, start:stop], batch)

    def one_by_one(self, start: int) -> list["RecordedTokens"]:
        """Each of the tokens from `start` on."""
        return [self.part(index, index + 1) for index in range(start, self.count)]

    def select_rows(self, rows: Sequence[int]) -> "RecordedTokens":
        """The rows named, in that order."""
        return RecordedTokens(self.keys[list(rows)], self.values[list(rows)], self.batch.select_rows(rows))


class Recordable(Protocol):
    """What recording does with a layer."""

    expects_prompt: bool  # whether a prompt comes next

    @property
    def seq_len(self) -> int:
        """Tokens of a row, pads included."""

    @property
    def compressed(self) -> bool:
        """Whether something else than all tokens is held."""

    @property
    def padded(self) -> bool:
        """Whether there are pads among the entries."""

    @property
    def one_by_one(self) -> bool:
        """Whether every single token may change what the next one attends to."""

    @property
    def has_observers(self) -> bool:
        """Whether anything follows what is attended to."""

    def append_recorded(self, recorded: RecordedTokens) -> None:
        """Append tokens, whose positions are known."""

    def drop(self, count: int) -> None:
        """Drop the newest tokens, behind which nothing has been altered."""

    def attended(self, batch: QueryBatch, dropout: float, *, observed: bool) -> Tensor:
        """Attention over what is held, [B, H, q, D]; `observed` says whether observers see it."""

    def observe_and_compress(self, batch: QueryBatch, *, decoding: bool, observed: bool) -> None:
        """Observe queries, then compress and pack what is due; `observed` says that observers have seen them."""

    def would_be_due(self, before: int, *, decoding: bool) -> bool:
        """Whether a row would have been compressed before the newest `before` tokens came."""

    def save(self) -> LayerState:
        """A copy of all that tokens change."""

    def restore(self, saved: LayerState) -> None:
        """Go back to such a copy, which must not be used again."""


class Recording:
    """What one layer has taken since the last `crop`."""

    def __init__(self) -> None:
        self.prompt: QueryBatch | None = None  # that has not been digested
        self.tokens: list[RecordedTokens] = []  # behind it, each by itself
        self.waiting = 0  # newest of them that have not been digested
        self.saved: LayerState | None = None  # the layer before the first of them, if dropping them does not lead there
        self._in_turn = False  # whether the tokens of this forward have been attended to one by one

    @property
    def is_empty(self) -> bool:
        """Whether nothing may be undone."""
        return self.prompt is None and not self.tokens

    @property
    def tensors(self) -> list[Tensor]:
        """What has been taken."""
        prompt = [] if self.prompt is None else [self.prompt.queries, self.prompt.positions]
        return prompt + [tensor for token in self.tokens for tensor in token.tensors]

    @property
    def saved_bytes(self) -> int:
        """Bytes of the copy to go back to."""
        return 0 if self.saved is None else self.saved.nbytes

    def attend(
        self, layer: Recordable, recorded: RecordedTokens, prompt_end: int | None, dropout: float
    ) -> Tensor | None:
        """Attention of tokens that have just been appended, [B, H, q, D]; None = over all that came, by a stock call.

        `prompt_end` is how many tokens the prompt ends behind, None when nobody has told: then all are a prompt.
        """
        self._in_turn = False
        if self.prompt is not None:
            layer.drop(recorded.count)
            self._finish_prompt(layer, self.prompt)
            layer.append_recorded(recorded)
        first = self._prompt_part(layer, recorded.count, prompt_end)
        if first == recorded.count or self._may_come_at_once(layer, recorded, first):
            return layer.attended(recorded.batch, dropout, observed=False) if layer.compressed else None
        self._in_turn = True
        return self._attend_in_turn(layer, recorded, first, dropout)

    def note_forward(self, layer: Recordable, recorded: RecordedTokens, prompt_end: int | None) -> None:
        """Note the tokens of a forward after its attention."""
        if self._in_turn:
            return
        first = self._prompt_part(layer, recorded.count, prompt_end)
        if first == recorded.count:
            self.prompt = recorded.batch
            return
        if first:
            layer.drop(recorded.count - first)
            self._finish_prompt(layer, recorded.batch.first(first))
            layer.append_recorded(recorded.part(first, recorded.count))
        self.tokens += recorded.one_by_one(first)
        self.waiting += recorded.count - first

    def crop(self, layer: Recordable, count: int) -> int:
        """Undo the newest `count` tokens and digest the others; how many are left that came before all of them."""
        if self.prompt is not None:
            size = self.prompt.queries.shape[2]
            undone = min(count, size)
            layer.drop(undone)
            if undone < size:
                self._finish_prompt(layer, self.prompt.first(size - undone))
        else:
            undone = min(count, len(self.tokens))
            self._finish_tokens(layer, self.tokens[: len(self.tokens) - undone], undone)
        self.prompt, self.tokens, self.waiting, self.saved = None, [], 0, None
        return count - undone

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order."""
        if self.prompt is not None:
            self.prompt = self.prompt.select_rows(rows)
        self.tokens = [token.select_rows(rows) for token in self.tokens]
        if self.saved is not None:
            self.saved = self.saved.selected(rows)

    def _prompt_part(self, layer: Recordable, count: int, prompt_end: int | None) -> int:
        """How many of the newest `count` tokens are of the prompt."""
        if not layer.expects_prompt:
            return 0
        before = layer.seq_len - count
        return min(count, prompt_end - before) if prompt_end is not None and prompt_end > before else count

    def _may_come_at_once(self, layer: Recordable, recorded: RecordedTokens, first: int) -> bool:
        """Whether nothing would be altered between the tokens."""
        if layer.one_by_one or layer.padded or self.saved is not None:
            return False
        behind = recorded.count - first
        if first and (layer.compressed or layer.would_be_due(behind, decoding=first == 1)):
            return False
        return not any(layer.would_be_due(before, decoding=True) for before in range(1, behind + self.waiting))

    def _attend_in_turn(self, layer: Recordable, recorded: RecordedTokens, first: int, dropout: float) -> Tensor:
        """Attention of each token over what decoding alone would hold when it comes."""
        layer.drop(recorded.count)
        outputs = []
        if first:
            prompt = recorded.part(0, first)
            layer.append_recorded(prompt)
            outputs.append(layer.attended(prompt.batch, dropout, observed=True))
            self._finish_prompt(layer, prompt.batch, observed=True)
        if self.saved is None:
            layer.drop(len(self.tokens))
            self.saved = layer.save()
            self._repeat(layer, self.tokens)
            self.waiting = min(1, len(self.tokens))
        for token in recorded.one_by_one(first):
            self._finish_waiting(layer)
            layer.append_recorded(token)
            outputs.append(layer.attended(token.batch, dropout, observed=True))
            self.tokens.append(token)
            self.waiting = 1
        return torch.cat(outputs, 2)

    def _repeat(self, layer: Recordable, tokens: Sequence[RecordedTokens]) -> None:
        """Take tokens once more, of which the last waits."""
        for index, token in enumerate(tokens):
            if index:
                layer.observe_and_compress(tokens[index - 1].batch, decoding=True, observed=True)
            layer.append_recorded(token)
            if layer.has_observers:
                layer.attended(token.batch, 0.0, observed=True)

    def _finish_prompt(self, layer: Recordable, batch: QueryBatch, *, observed: bool = False) -> None:
        layer.observe_and_compress(batch, decoding=batch.queries.shape[2] == 1, observed=observed)
        self.prompt, layer.expects_prompt = None, False

    def _finish_waiting(self, layer: Recordable) -> None:
        if self.waiting:
            layer.observe_and_compress(self.tokens[-1].batch, decoding=True, observed=True)
            self.waiting = 0

    def _finish_tokens(self, layer: Recordable, left: Sequence[RecordedTokens], undone: int) -> None:
        if self.saved is None:
            layer.drop(len(self.tokens))
            for token in left:
                layer.append_recorded(token)
                layer.observe_and_compress(token.batch, decoding=True, observed=False)
        elif undone:
            layer.restore(self.saved)
            self._repeat(layer, left)
            if left:
                layer.observe_and_compress(left[-1].batch, decoding=True, observed=True)
        else:
            self._finish_waiting(layer)
