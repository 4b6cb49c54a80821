"""Whether a cache is consistent: one object for all layers, so that a failure in one layer is known to all."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from kvpolicy.errors import CacheError, UnsupportedCallError

_REMEDY = "call reset(), or start with a new cache"


@attrs.define
class _Forward:
    """A forward in progress: it ends when every layer has appended its tokens and computed attention."""

    announced: bool  # whether `end_forward` will be called; otherwise it ends with the last layer
    updated: set[int] = attrs.field(factory=set)  # layers that have appended its tokens
    attended: set[int] = attrs.field(factory=set)  # layers that have also computed attention


class Integrity:
    """Tracks the changes of one cache. A change that fails stays open, and all later changes are refused.

    A change is open from before its first effect until after its last one. So an exception or an interrupt at any line
    leaves it open, and no handler is needed. Layers are named by their index in the model.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)  # layers that take part in a forward
        self._open: str | None = None  # the change in progress, or the one that failed
        self._forward: _Forward | None = None
        self._members: frozenset[int] | None = None  # layers that took part in the forwards so far
        self._retired: str | None = None
        self._transfer_lock = threading.RLock()  # another thread may move entries to use the static storage itself

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_transfer_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transfer_lock = threading.RLock()

    @property
    def is_whole(self) -> bool:
        """Whether no change is open. A forward that has not reached a layer has changed nothing."""
        return self._open is None and not (self._forward and self._forward.updated)

    def resume(self, members: Iterable[int]) -> None:
        """A new cache continues the state of another one, in whose forwards these layers took part."""
        self._members = frozenset(members)

    def require_whole(self) -> None:
        """Raise CacheError if a change is open or has failed, or if the cache was retired."""
        self._require_in_use()
        if not self.is_whole:
            raise CacheError(self._fault())

    def retire(self, reason: str) -> None:
        """Refuse all further changes, with this reason."""
        self._retired = reason

    @contextlib.contextmanager
    def change(self, name: str) -> Iterator[None]:
        """Context of one change of the cache. Raises CacheError like `require_whole`, before the body runs."""
        with self._transfer_lock:
            self.require_whole()
            self._open = name
            yield
            self._open = None

    @property
    def unmoved(self) -> contextlib.AbstractContextManager[object]:
        """While it is entered, no other thread moves entries between storages."""
        return self._transfer_lock

    @contextlib.contextmanager
    def hand_over(self) -> Iterator[None]:
        """Context in which entries move between storages. The contents do not change, so it is never refused."""
        with self._transfer_lock:
            previous, self._open = self._open, self._open or "move to another storage"
            yield
            self._open = previous

    @contextlib.contextmanager
    def renewal(self) -> Iterator[None]:
        """Context in which the cache is emptied; it is consistent afterwards. Raises CacheError if it was retired."""
        self._require_in_use()
        with self._transfer_lock:
            self._open = "reset"
            yield
            self._forward = self._members = None
            self._open = None

    # -- forwards ----------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """Begin a forward; `end_forward` is called after it."""
        with self._transfer_lock:
            self.require_whole()
        self._forward = _Forward(announced=True)

    def end_forward(self) -> None:
        """End a forward. Raises CacheError if layers were left out, or computed no attention."""
        with self._transfer_lock:
            forward = self._forward
            if self._open is not None or forward is None:
                return
            if forward.updated != forward.attended:
                raise CacheError(self._fault())
            self._require_members(forward)
        self._forward = None

    def require_complete(self) -> None:
        """Raise CacheError when the forward in progress left out layers, or did not attend in some of them."""
        forward = self._forward
        if self._open is not None or (forward is not None and forward.updated != forward.attended):
            raise CacheError(self._fault())
        if forward is not None:
            self._require_members(forward)

    def require_announced(self, layer: int) -> None:
        """Raise UnsupportedCallError unless somebody will say when the forward in progress has returned."""
        if self._forward is None or not self._forward.announced:
            raise UnsupportedCallError(
                f"layer {layer}: the policy reads prompts again when the model's forward has returned, and this is a "
                "forward of a part of it, or a compiled one: call the model that the policy is attached to"
            )

    def require_ready(self, layer: int) -> None:
        """Raise CacheError if the layer cannot append tokens, because an earlier forward or change failed."""
        if self._retired is not None:
            raise CacheError(self._retired)
        if self._open is not None or (self._forward and layer in self._forward.updated):
            raise CacheError(self._fault())

    def begin_update(self, layer: int) -> None:
        """The layer, which is ready, is about to append the tokens of a forward; begins one if none is in progress."""
        if self._forward is None:
            self._forward = _Forward(announced=False)
        self._forward.updated.add(layer)

    def require_updated(self, layer: int) -> None:
        """Raise CacheError unless the layer has appended tokens and not yet computed attention."""
        forward = self._forward
        if forward is None or layer not in forward.updated or layer in forward.attended:
            raise CacheError(f"layer {layer}: attention must be called once for each update of the cache")

    def end_update(self, layer: int, at_end: Callable[[], None] | None = None) -> None:
        """The layer has computed attention. A forward that was not announced ends with its last layer.

        `at_end` is called before, if all other layers have computed attention.
        """
        forward = self._forward
        if forward is None:
            return
        is_last = len(forward.attended) + 1 >= len(self.layers) and forward.attended >= self.layers - {layer}
        if is_last and at_end is not None:
            at_end()
        forward.attended.add(layer)
        if is_last and not forward.announced:
            self._require_members(forward)
            self._forward = None

    def begin_step(self) -> None:
        """Begin a forward that updates all layers at once."""
        self.require_whole()
        forward = self._forward or _Forward(announced=False)
        forward.updated = set(self.layers)
        self._forward = forward

    def end_step(self) -> None:
        """End a forward begun by `begin_step`."""
        forward = self._forward
        if forward is not None and forward.announced:
            forward.attended = set(self.layers)
        else:
            self._forward = None

    def _require_members(self, forward: _Forward) -> None:
        if not forward.updated:
            return
        if self._members is not None and self._members != forward.updated:
            left_out = sorted(self._members ^ forward.updated)
            raise CacheError(f"layers {left_out} did not take part in every forward of this cache; {_REMEDY}")
        self._members = frozenset(forward.updated)

    def _require_in_use(self) -> None:
        if self._retired is not None:
            raise CacheError(self._retired)

    def _fault(self) -> str:
        if self._open is not None:
            return f"the last {self._open} of this cache failed before its end; {_REMEDY}"
        return f"the last forward of this cache failed, or did not reach kvpolicy's attention in every layer; {_REMEDY}"
