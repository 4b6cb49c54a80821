"""The token ids of what no pass has read yet, for scorers that read prompts again."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.cache.state_contents import Contents, Described
from kvpolicy.errors import ParameterError, UnsupportedCallError, shown

_NONE = -1  # in place of an id: a pad, or a token that has been read
_JOINED = 64  # forwards whose ids are held one by one


@attrs.frozen(eq=False)
class ForwardTokens:
    """What a forward is given: `count` tokens of each of B rows."""

    rows: int
    count: int
    ids: Tensor | None = None  # int64 [B, q]; None = not known
    mask: Tensor | None = None  # [B, columns], pads 0, for earlier forwards, too; None = there are no pads
    places: Tensor | None = None  # [..., B or 1, q], positions for the rotation; None = the model counts columns
    unknown: str = ""  # why the ids are not known
    strange_mask: bool = False  # whether a mask was given that does not say which tokens are pads

    def real(self, seen: int) -> Tensor | None:
        """Which of the tokens that come behind `seen` columns are no pads, bool [B, q]; None = all."""
        if self.mask is None:
            return None
        real = self.mask[:, seen : seen + self.count].bool()
        return functional.pad(real, (0, self.count - real.shape[1]))  # a short mask hides the rest, as in the model


class PromptTokens:
    """Common to the layers of a cache: ids of the newest columns, and where an announced prompt ends.

    Of each row the ids behind its last passes are held. They are those of its newest tokens, which tells their places.
    """

    def __init__(self, given: object = None) -> None:
        """`given` are ids of the first columns of a request, [R, n] or [n]; ParameterError for what is none."""
        self._given = None if given is None else _checked(given)
        self.clear()

    def clear(self) -> None:
        """Forget the rows: the cache has been emptied."""
        self.given = self._given
        self.end: int | None = None  # columns behind which an announced prompt ends
        self.begun = False  # whether some of that prompt has come
        self.is_prompt = False  # whether the forward in progress brings a prompt, and no decode step
        self.arriving: ForwardTokens | None = None
        self._chunks: list[Tensor] = []  # int64 [B, q] each

    def expect(self, end: int | None) -> None:
        """Say that the next prompt ends behind so many columns."""
        self.end, self.begun = end, False

    # -- one forward -------------------------------------------------------------------------------------------

    def begin(self, tokens: ForwardTokens, seen: int) -> ForwardTokens:
        """A forward is about to bring tokens behind `seen` columns: what is known of them. Nothing is held of them yet.

        A single token is a decode step, but for one of a prompt that is announced and has more of them.
        Raises UnsupportedCallError when the ids that were given do not go with the rows.
        """
        announced = self.end is not None and self.end > seen
        if not announced:
            self.end, self.begun = None, False
        self.is_prompt = tokens.count > 1 or (announced and (self.begun or self.end != seen + 1))
        self.arriving = self._with_given(tokens, seen)
        return self.arriving

    def _with_given(self, tokens: ForwardTokens, seen: int) -> ForwardTokens:
        """The tokens with the ids that were given with the cache, if those cover them."""
        if self.given is None or self.given.shape[1] < seen + tokens.count:
            return tokens
        if tokens.rows % self.given.shape[0]:
            raise UnsupportedCallError(
                f"tokens of {self.given.shape[0]} rows were given with the cache, the forward has {tokens.rows}"
            )
        given = self.given[:, seen : seen + tokens.count]
        return attrs.evolve(tokens, ids=given.repeat_interleave(tokens.rows // given.shape[0], 0), unknown="")

    def end_of(self, seen: int) -> int:
        """Columns behind which the prompt in progress ends, once its forward has brought it to `seen` columns."""
        return seen if self.end is None else max(self.end, seen)

    def commit(self, seen: int) -> bool:
        """The forward has brought its tokens, `seen` columns in all: whether it has ended a prompt."""
        arriving, self.arriving = self.arriving, None
        if arriving is None:
            return False
        if arriving.ids is None:
            self._chunks = []  # what came before is no longer the newest
        else:
            real = arriving.real(seen - arriving.count)
            ids = arriving.ids.to(torch.int64)
            self._chunks.append(ids.clone() if real is None else ids.masked_fill(~real.to(ids.device), _NONE))
            if len(self._chunks) > _JOINED:
                self._chunks = [self._joined()]
        if not self.is_prompt:
            return False
        over = self.end is None or seen >= self.end
        self.end, self.begun = (None, False) if over else (self.end, True)
        return over

    # -- what is held ------------------------------------------------------------------------------------------

    def _joined(self) -> Tensor:
        """All ids as int64 [B, n]."""
        chunks = [chunk.to(self._chunks[-1].device) for chunk in self._chunks]
        return torch.cat(chunks, 1) if chunks else torch.empty((0, 0), dtype=torch.int64)

    def unread(self, rows: Sequence[int]) -> list[Tensor]:
        """For each of the rows, the ids of its newest tokens, which no pass has read: int64 [n], in host memory."""
        ids = self._joined().cpu()
        return [ids[row][ids[row] >= 0] for row in rows] if ids.numel() else [ids.flatten()] * len(rows)

    def forget(self, rows: Sequence[int]) -> None:
        """The rows have been read."""
        ids = self._joined()
        ids[list(rows)] = _NONE  # a copy
        self._chunks = [ids] if bool((ids >= 0).any()) else []

    def crop(self, seen: int, count: int) -> None:
        """The newest `count` columns have been undone, and `seen` are left."""
        if self.given is not None:
            self.given = self.given[:, :seen]  # what comes instead of the others is something else
        ids = self._joined()
        left = ids[:, : max(0, ids.shape[1] - count)]
        self._chunks = [left] if left.numel() else []

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows named, in that order."""
        held = len(self._chunks[0]) if self._chunks else 0
        self._chunks = [self._joined()[list(rows)]] if held else []
        self.given = None  # they are those of other rows, in most cases

    def go_on_as(self, other: "PromptTokens", rows: Sequence[int]) -> None:
        """Take over what the rows named of another cache have."""
        self._chunks = [other._joined()[list(rows)]] if other._chunks else []  # noqa: SLF001 - of its own class
        self.end, self.begun = other.end, other.begun

    def describe(self) -> Described:
        """Its state: ids int64 [B, n] or [0, 0], and the end of a prompt that is announced, 0 where none is."""
        yield "ids", self._joined()
        yield "end", self.end or 0
        yield "begun", self.begun

    def restore(self, contents: Contents, rows: int) -> None:
        """Take the state of so many rows that is written there."""
        ids = contents.tensor("ids", torch.int64, (None, None))
        if ids.shape[0] not in (0, rows) or bool((ids < _NONE).any()):
            raise contents.wrong("ids", f"must be token ids of {rows} rows")
        self._chunks = [ids] if ids.numel() else []
        self.end, self.begun = contents.integer("end") or None, contents.flag("begun")

    @property
    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [*self._chunks, *([] if self.given is None else [self.given])]


def _checked(given: object) -> Tensor:
    """Ids as int64 [R, n]."""
    if not isinstance(given, Tensor) or given.dtype not in (torch.int64, torch.int32) or given.ndim not in (1, 2):
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else shown(given)
        raise ParameterError(f"tokens must be ids, an integer tensor [rows, n] or [n]: {found}")
    if not given.numel() or bool((given < 0).any()):
        raise ParameterError("tokens must be ids from 0 on, at least one")
    return given.detach().to(torch.int64).reshape(-1, given.shape[-1]).clone()
