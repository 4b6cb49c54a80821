"""Tokens that may be undone: candidates of assisted decoding are taken one by one, as decoding alone would take them.

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
from kvpolicy.cache.query_batch import Asked


@attrs.frozen(eq=False)
class Taken:
    """Tokens that a layer has taken."""

    keys: Tensor  # [B, K, q, D]
    values: Tensor
    asked: Asked

    @property
    def count(self) -> int:
        """How many they are, q."""
        return self.keys.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values, queries and their positions."""
        return self.keys, self.values, self.asked.queries, self.asked.positions

    def part(self, start: int, stop: int) -> "Taken":
        """Some of the tokens."""
        asked = self.asked.first(stop).newest(stop - start)
        return Taken(self.keys[:, :, start:stop], self.values[:, :, start:stop], asked)

    def one_by_one(self, start: int) -> list["Taken"]:
        """Each of the tokens from `start` on."""
        return [self.part(place, place + 1) for place in range(start, self.count)]

    def select_rows(self, rows: Sequence[int]) -> "Taken":
        """The rows named, in that order."""
        return Taken(self.keys[list(rows)], self.values[list(rows)], self.asked.select_rows(rows))


class Recordable(Protocol):
    """What recording does with a layer."""

    prompting: bool  # whether a prompt comes next

    @property
    def seen(self) -> int:
        """Tokens of a row, pads included."""

    @property
    def altered(self) -> bool:
        """Whether something else than all tokens is held."""

    @property
    def padded(self) -> bool:
        """Whether there are pads among the entries."""

    @property
    def one_by_one(self) -> bool:
        """Whether every single token may change what the next one attends to."""

    @property
    def watched(self) -> bool:
        """Whether anything follows what is attended to."""

    def put(self, taken: Taken) -> None:
        """Append tokens, whose positions are known."""

    def drop(self, count: int) -> None:
        """Drop the newest tokens, behind which nothing has been altered."""

    def attended(self, asked: Asked, dropout: float, *, followed: bool) -> Tensor:
        """Attention over what is held, [B, H, q, D]; `followed` says whether followers see it."""

    def digest(self, asked: Asked, *, decoding: bool, followed: bool) -> None:
        """Observe queries, then compress and pack what is due; `followed` says that followers have seen them."""

    def alters(self, before: int, *, decoding: bool) -> bool:
        """Whether a row would have been compressed before the newest `before` tokens came."""

    def save(self) -> LayerState:
        """A copy of all that tokens change."""

    def restore(self, saved: LayerState) -> None:
        """Go back to such a copy, which must not be used again."""


class Recording:
    """What one layer has taken since the last `crop`."""

    def __init__(self) -> None:
        self.prompt: Asked | None = None  # that has not been digested
        self.tokens: list[Taken] = []  # behind it, each by itself
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
        return prompt + [tensor for one in self.tokens for tensor in one.tensors]

    @property
    def saved_bytes(self) -> int:
        """Bytes of the copy to go back to."""
        return 0 if self.saved is None else self.saved.nbytes

    def attend(self, layer: Recordable, taken: Taken, prompt_end: int | None, dropout: float) -> Tensor | None:
        """Attention of tokens that have just been appended, [B, H, q, D]; None = over all that came, by a stock call.

        `prompt_end` is how many tokens the prompt ends behind, None when nobody has told: then all are a prompt.
        """
        self._in_turn = False
        if self.prompt is not None:
            layer.drop(taken.count)
            self._digest_prompt(layer, self.prompt)
            layer.put(taken)
        first = self._prompt_part(layer, taken.count, prompt_end)
        if first == taken.count or self._may_come_at_once(layer, taken, first):
            return layer.attended(taken.asked, dropout, followed=False) if layer.altered else None
        self._in_turn = True
        return self._attend_in_turn(layer, taken, first, dropout)

    def settle(self, layer: Recordable, taken: Taken, prompt_end: int | None) -> None:
        """Note the tokens of a forward after its attention."""
        if self._in_turn:
            return
        first = self._prompt_part(layer, taken.count, prompt_end)
        if first == taken.count:
            self.prompt = taken.asked
            return
        if first:
            layer.drop(taken.count - first)
            self._digest_prompt(layer, taken.asked.first(first))
            layer.put(taken.part(first, taken.count))
        self.tokens += taken.one_by_one(first)
        self.waiting += taken.count - first

    def crop(self, layer: Recordable, count: int) -> int:
        """Undo the newest `count` tokens and digest the others; how many are left that came before all of them."""
        if self.prompt is not None:
            size = self.prompt.queries.shape[2]
            undone = min(count, size)
            layer.drop(undone)
            if undone < size:
                self._digest_prompt(layer, self.prompt.first(size - undone))
        else:
            undone = min(count, len(self.tokens))
            self._digest_tokens(layer, self.tokens[: len(self.tokens) - undone], undone)
        self.prompt, self.tokens, self.waiting, self.saved = None, [], 0, None
        return count - undone

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order."""
        if self.prompt is not None:
            self.prompt = self.prompt.select_rows(rows)
        self.tokens = [one.select_rows(rows) for one in self.tokens]
        if self.saved is not None:
            self.saved = self.saved.selected(rows)

    def _prompt_part(self, layer: Recordable, count: int, prompt_end: int | None) -> int:
        """How many of the newest `count` tokens are of the prompt."""
        if not layer.prompting:
            return 0
        before = layer.seen - count
        return min(count, prompt_end - before) if prompt_end is not None and prompt_end > before else count

    def _may_come_at_once(self, layer: Recordable, taken: Taken, first: int) -> bool:
        """Whether nothing would be altered between the tokens."""
        if layer.one_by_one or layer.padded or self.saved is not None:
            return False
        behind = taken.count - first
        if first and (layer.altered or layer.alters(behind, decoding=first == 1)):
            return False
        return not any(layer.alters(before, decoding=True) for before in range(1, behind + self.waiting))

    def _attend_in_turn(self, layer: Recordable, taken: Taken, first: int, dropout: float) -> Tensor:
        """Attention of each token over what decoding alone would hold when it comes."""
        layer.drop(taken.count)
        outputs = []
        if first:
            prompt = taken.part(0, first)
            layer.put(prompt)
            outputs.append(layer.attended(prompt.asked, dropout, followed=True))
            self._digest_prompt(layer, prompt.asked, followed=True)
        if self.saved is None:
            layer.drop(len(self.tokens))
            self.saved = layer.save()
            self._repeat(layer, self.tokens)
            self.waiting = min(1, len(self.tokens))
        for one in taken.one_by_one(first):
            self._digest_waiting(layer)
            layer.put(one)
            outputs.append(layer.attended(one.asked, dropout, followed=True))
            self.tokens.append(one)
            self.waiting = 1
        return torch.cat(outputs, 2)

    def _repeat(self, layer: Recordable, tokens: Sequence[Taken]) -> None:
        """Take tokens once more, of which the last waits."""
        for place, one in enumerate(tokens):
            if place:
                layer.digest(tokens[place - 1].asked, decoding=True, followed=True)
            layer.put(one)
            if layer.watched:
                layer.attended(one.asked, 0.0, followed=True)

    def _digest_prompt(self, layer: Recordable, asked: Asked, *, followed: bool = False) -> None:
        layer.digest(asked, decoding=asked.queries.shape[2] == 1, followed=followed)
        self.prompt, layer.prompting = None, False

    def _digest_waiting(self, layer: Recordable) -> None:
        if self.waiting:
            layer.digest(self.tokens[-1].asked, decoding=True, followed=True)
            self.waiting = 0

    def _digest_tokens(self, layer: Recordable, left: Sequence[Taken], undone: int) -> None:
        if self.saved is None:
            layer.drop(len(self.tokens))
            for one in left:
                layer.put(one)
                layer.digest(one.asked, decoding=True, followed=False)
        elif undone:
            layer.restore(self.saved)
            self._repeat(layer, left)
            if left:
                layer.digest(left[-1].asked, decoding=True, followed=True)
        else:
            self._digest_waiting(layer)
