"""What stands in the place of a model's `forward` while a policy with fixed shapes is attached."""

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.decode_graph.limits import capacities, fingerprint, fit
from kvpolicy.integrations.transformers.decode_graph.runners import Mode
from kvpolicy.integrations.transformers.decode_graph.session import StaticSession
from kvpolicy.plan.plan import Plan

FORWARD = "forward"
_SERVED = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values"})
_GIVEN = frozenset({"logits", "past_key_values"})  # what an output may consist of


@attrs.frozen(eq=False)
class _Request:
    """A forward of one token a row with a cache of ours."""

    tokens: Tensor  # [B, 1]
    mask: Tensor | None  # [B, tokens seen + 1]
    places: Tensor | None  # [B or 1, 1]
    cache: PolicyCache


class DecodeForward:
    """Serves decode steps from static storage, and everything else by the model's own `forward`.

    A cache gets in with its second decode step in a row: the first shows what an output looks like, and decoding that
    moves rows between steps (beam search) or undoes tokens never gets that far. One thread at a time.
    """

    def __init__(self, plan: Plan, model: PreTrainedModel, mode: Mode) -> None:
        self.plan, self.model, self.mode = plan, model, mode
        self.previous = model.__dict__.get(FORWARD)  # what somebody else had put there
        self._forget()

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own; `inspect.signature` looks here."""
        own: Callable[..., Any] = self.previous or getattr(type(self.model), FORWARD).__get__(self.model)
        return own

    def __call__(self, *args: Any, **call: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.__wrapped__(*args, **call)
        with self._lock:
            request = self._request(args, call)
            if request is not None and self._ready(request):
                return self._serve(request)
            outputs = self.__wrapped__(*args, **call)
            self._remember(request, outputs)
            return outputs

    def flush(self) -> None:
        """Warn of what has been counted so far. Raises UnsupportedCallError as a step would."""
        if self._session is not None:
            self._session.faults.flush()

    @property
    def nbytes(self) -> int:
        """Bytes that steps of fixed shapes hold beside the entries of the cache that is in."""
        return 0 if self._session is None else self._session.nbytes

    def detach(self) -> None:
        """Give the model its `forward` back and let go of the storage; the cache that is in goes on without.

        May be called again after it was interrupted.
        """
        if self.model.__dict__.get(FORWARD) is self and self.previous is None:
            del self.model.__dict__[FORWARD]
        elif self.model.__dict__.get(FORWARD) is self:
            self.model.__dict__[FORWARD] = self.previous
        session = self._session
        self._forget()
        if session is not None:
            session.faults.flush()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model starts anew."""
        return {"plan": self.plan, "model": self.model, "mode": self.mode, "previous": self.previous}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._session: StaticSession | None = None
        self._weights: object = None  # of the model for which the session was made
        self._calm: tuple[object, ...] = ()  # which cache has just done a decode step by itself, and its `changes`
        self._output: type[Any] | None = None  # how an output of such a step is made
        self._lock = threading.RLock()
        self._names = tuple(inspect.signature(self.__wrapped__).parameters)  # of arguments given by place

    def _request(self, args: tuple[Any, ...], call: Mapping[str, Any]) -> _Request | None:
        """The call, if it is a decode step that asks for nothing but logits."""
        given = {**dict(zip(self._names, args, strict=False)), **call}
        cache = given.get("past_key_values")
        if not isinstance(cache, PolicyCache) or cache.plan is not self.plan:
            return None
        if any(_asks_for_more(name, value) for name, value in given.items()):
            return None
        tokens, mask, places = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        rows, seen = cache.rows, cache.managed[0].get_seq_length()
        if not isinstance(tokens, Tensor) or tokens.shape != (rows, 1):
            return None  # of other rows, the cache will say what is wrong
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (rows, seen + 1)):
            return None
        if places is not None and (not isinstance(places, Tensor) or places.shape not in {(rows, 1), (1, 1)}):
            return None
        return _Request(tokens, mask, places, cache)

    def _ready(self, request: _Request) -> bool:
        """Whether the cache is in static storage; it is let in if it may be."""
        cache, session = request.cache, self._session
        if self.model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(self.plan.device.type):
            return False
        if cache.prompt is not None and cache.prompt.is_prompt:
            return False  # a single token, but one of a prompt that is read again
        if session is None or not session.holds(cache):
            if self._calm != _state_of(cache) or not _may_enter(cache):
                return False
            session = self._session_for(cache)
            session.enter(cache)
        return session.has_room() and self._is_expected(session, request.mask)

    def _session_for(self, cache: PolicyCache) -> StaticSession:
        rows, weights = len(cache.managed[0].num_tokens), fingerprint(self.model)
        needed = capacities(self.plan, min(cache.managed[0].num_tokens))
        session = self._session
        if session is not None and session.rows == rows and self._weights == weights:
            if fit(session.capacities, needed):
                return session
            needed = tuple(map(max, session.capacities, needed))
        self.flush()
        self._session = StaticSession(self.plan, self.__wrapped__, self.mode, rows, needed)
        self._weights = weights
        return self._session

    def _is_expected(self, session: StaticSession, mask: Tensor | None) -> bool:
        """Whether a mask hides the pads of the prompt and nothing else. A GPU is not waited for: it only counts."""
        if mask is None:
            return True
        strange = mask.count_nonzero(dim=1) != session.inputs.clock + 1
        if mask.is_cuda:
            session.faults.masks.add_(strange.sum())
            return True
        return not bool(strange.any())

    def _serve(self, request: _Request) -> Any:
        session = self._session
        if session is None or self._output is None:
            return None
        places = request.places
        if places is None:
            places = torch.full_like(request.tokens, request.cache.managed[0].get_seq_length())
        logits = session.run(request.tokens, places.expand_as(request.tokens))
        self._calm = _state_of(request.cache)
        return self._output(logits=logits, past_key_values=request.cache)

    def _remember(self, request: _Request | None, outputs: Any) -> None:
        """Note that the next decode step of a cache may be served; or, of any other call, that it may not."""
        self._calm = ()
        if request is not None and isinstance(outputs, Mapping) and outputs.keys() <= _GIVEN:
            self._calm, self._output = _state_of(request.cache), type(outputs)


def _may_enter(cache: PolicyCache) -> bool:
    """Whether decode steps of a cache can have fixed shapes: nothing of it may be undone, and it has no regions."""
    return (
        cache.integrity.is_whole
        and cache.spans.regions is None
        and all(
            layer.is_initialized
            and not layer.record_past
            and layer.recording.is_empty
            and isinstance(layer.storage, SegmentedStorage)
            for layer in cache.managed
        )
    )


def _state_of(cache: PolicyCache) -> tuple[object, ...]:
    return (id(cache), *(layer.changes for layer in cache.managed))


def _asks_for_more(name: str, value: object) -> bool:
    """Whether an argument makes a decode step give something else than logits."""
    if name in {"use_cache", "return_dict"}:
        return value is not None and value is not True
    if name == "logits_to_keep":
        return not isinstance(value, int)  # of one token that is all of them
    return name not in _SERVED and value is not None and value is not False
