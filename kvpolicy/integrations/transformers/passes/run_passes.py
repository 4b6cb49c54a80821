"""Reads prompts again: what happens before and after each forward of a policy whose scorers ask for it."""

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.cache.request.pass_batch import PassBatch
from kvpolicy.cache.request.prompt_tokens import ForwardTokens, PromptTokens
from kvpolicy.errors import UnsupportedCallError
from kvpolicy.integrations.transformers.models.guard import Restoring
from kvpolicy.integrations.transformers.models.model_snapshot import Snapshot
from kvpolicy.integrations.transformers.passes.forward_tokens import places_behind
from kvpolicy.integrations.transformers.passes.hidden_norms import HiddenNorms
from kvpolicy.integrations.transformers.passes.pass_cache import PassCache
from kvpolicy.integrations.transformers.torch_modes import exact
from kvpolicy.plan.passes import PassObserver
from kvpolicy.stages import Pass, Prompt
from kvpolicy.stages.checking.returned import contract_error

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.cache import PolicyCache

_AT_A_TIME = threading.Lock()
_locks: "weakref.WeakKeyDictionary[PreTrainedModel, threading.Lock]" = weakref.WeakKeyDictionary()


def expect_tokens(cache: "PolicyCache", prompt: PromptTokens, tokens: ForwardTokens | None) -> None:
    """A forward is about to bring these tokens. Raises UnsupportedCallError when it is a prompt that cannot be read.

    It can where its token ids and pads are known, and need not be where the budget holds all of it.
    """
    seen = cache.get_seq_length()
    if tokens is None:
        raise UnsupportedCallError("the policy reads prompts again: forwards must have input_ids or inputs_embeds")
    known = prompt.begin(tokens, seen)
    end = prompt.end_of(seen + known.count)
    if not prompt.is_prompt or min(cache.plan.budgets.per_layer(end)) >= end:
        return
    name = cache.plan.passes[0].scorer.name
    if known.strange_mask:
        raise UnsupportedCallError(f"score: {name} reads prompts again: attention_mask must be [rows, tokens], or none")
    if known.ids is None:
        raise UnsupportedCallError(
            f"score: {name} reads prompts again, and the token ids of this one are not known: the model was given "
            f"{known.unknown}; give them with the cache: attachment.cache(tokens=...)"
        )


def read_prompt(cache: "PolicyCache", prompt: PromptTokens, model: PreTrainedModel) -> None:
    """The forward has returned: if it has ended a prompt, run all passes over it, then compress it.

    The forward of the cache stays open meanwhile: what fails in a pass leaves a cache that refuses to go on.
    """
    cache.integrity.require_complete()
    seen, arrived = cache.get_seq_length(), prompt.arriving
    if not prompt.commit(seen) or arrived is None:
        return
    rows = cache.due_after_prompt()
    unread = {row: ids for row, ids in zip(rows, prompt.unread(rows), strict=True) if ids.numel()}
    if unread:
        _Passes(cache, model, arrived, seen).run(unread)
        prompt.forget(list(unread))
    prompt.is_prompt = False
    for layer in cache.managed:
        if layer.is_initialized:
            layer.compress_prompt()


class _Passes:
    """Those over one prompt, which has come with the forward `arrived` and brought the cache to `seen` columns."""

    def __init__(self, cache: "PolicyCache", model: PreTrainedModel, arrived: ForwardTokens, seen: int) -> None:
        self.cache, self.model, self.arrived, self.seen = cache, model, arrived, seen
        self.num_tokens = cache.managed[0].num_tokens
        self.device = (arrived.ids if arrived.ids is not None else cache.managed[0].storage).device
        self.hidden_norms: HiddenNorms | None = None
        self.accepted = inspect.signature(type(model).forward).parameters

    def run(self, tokens: Mapping[int, Tensor]) -> None:
        """All passes of all scorers over the prompts of some rows, token ids [n] by row."""
        prompts = {row: self._prompt(row, ids) for row, ids in tokens.items()}
        with _as_it_is(self.model):
            self._watch_hidden_states()
            for observer in self.cache.plan.passes:
                wanted = {row: observer.passes(prompt) for row, prompt in prompts.items()}
                self._check(observer, wanted)
                for number in range(max(map(len, wanted.values()))):
                    self._forward(observer, {row: own[number] for row, own in wanted.items() if number < len(own)})

    def _watch_hidden_states(self) -> None:
        """If a scorer asks for them; the hooks go when the model is put back as it was."""
        if self.cache.owner is not None and any(observer.needs.hidden_norms for observer in self.cache.plan.passes):
            self.hidden_norms = HiddenNorms(self.cache.owner.attention_modules())

    def _prompt(self, row: int, ids: Tensor) -> Prompt:
        tokens = self.num_tokens[row]
        protected = self.cache.spans.protected_tokens(row, tokens, *self.cache.plan.budgets.protected(tokens))
        return Prompt(ids, protected)

    def _check(self, observer: PassObserver, wanted: Mapping[int, Sequence[Pass]]) -> None:
        """Raise PluginContractError for ids that the model has no embedding for."""
        known = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        largest = max((int(own_pass.tokens.max()) for own in wanted.values() for own_pass in own), default=0)
        if known is not None and largest >= known:
            raise contract_error(observer.scorer, f"gave a pass with token {largest}, expected ids below {known}")

    def _forward(self, observer: PassObserver, passes: Mapping[int, Pass]) -> None:
        batch = PassBatch.of(passes, self.num_tokens, self.device)
        with exact(self.cache.plan.device.type):
            layers = PassCache(self.cache, batch, observer)
        call: dict[str, Any] = {"input_ids": batch.tokens, "past_key_values": layers, "use_cache": True}
        optional = {
            "attention_mask": self._mask(batch),
            "position_ids": self._places(batch.count),
            "logits_to_keep": 1 if "logits_to_keep" in self.accepted else None,  # nobody looks at them
        }
        if self.hidden_norms is not None:
            self.hidden_norms.expect(layers)
        self.model(**call, **{name: value for name, value in optional.items() if value is not None})
        layers.require_finished()

    def _mask(self, batch: PassBatch) -> Tensor | None:
        """Which columns are no pads, int64 [B, seen + m]; None where there has been no mask, and none is needed."""
        before = self.arrived.mask
        if before is None:
            if not batch.padded:
                return None
            before = batch.real.new_ones(batch.real.shape[0], self.seen)
        before = torch.nn.functional.pad(before[:, : self.seen].bool(), (0, max(0, self.seen - before.shape[1])))
        return torch.cat([before, batch.real.to(before.device)], 1).long()

    def _places(self, count: int) -> Tensor | None:
        real = self.arrived.real(self.seen - self.arrived.count)
        return places_behind(self.arrived, real, self.num_tokens, count)


@contextmanager
def _as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """The model is in evaluation mode, without gradients; it, its buffers and random numbers are then as they were.

    One thread at a time: what another one finds changed for a while it would put back for good.
    """
    with _AT_A_TIME:
        lock = _locks.setdefault(model, threading.Lock())
    with lock:
        snapshot = Snapshot(model)
        with Restoring(snapshot.restore), Restoring(snapshot.restore), torch.no_grad():
            snapshot.spare_buffers(model)
            if any(module.training for module in model.modules()):
                model.eval()
            yield
