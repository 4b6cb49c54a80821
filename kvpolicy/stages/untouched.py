"""Whether a plugin left alone what it was shown; asked by the conformance suite, and at run time by those who debug."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kvpolicy.stages.checks import contract_error
from kvpolicy.stages.contracts import Plugin, ReadRequest
from kvpolicy.stages.prompt_passes import Prompt
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.view import View

DEBUG = "KVPOLICY_DEBUG"


def debugging() -> bool:
    """Whether the environment asks for checks that cost a copy of all that plugins see: `KVPOLICY_DEBUG=1`."""
    return os.environ.get(DEBUG, "") not in ("", "0")


@contextmanager
def watching(plugin: Plugin, shown: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Under `KVPOLICY_DEBUG=1`, `untouched` for the tensors that `shown` gives; else nothing."""
    if not debugging():
        yield
        return
    with untouched(plugin, shown()):
        yield


@contextmanager
def untouched(plugin: Plugin, shown: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses writes to tensors while the plugin is called.

    Raises:
        PluginContractError: naming the plugin and the tensor, when a tensor holds other numbers afterwards, or was
            written to in place, even with what it held before.
    """
    before = {name: (tensor, tensor.clone(), _writes(tensor)) for name, tensor in shown.items()}
    yield
    for name, (tensor, copy, writes) in before.items():
        if not _same(tensor, copy) or _writes(tensor) != writes:
            raise contract_error(plugin, f"changed its input {name!r}, expected it to be read only")


def tensors_of(view: View) -> dict[str, Tensor]:
    """Everything in a view that a plugin could write to, what the view has computed from its entries included."""
    names = ("keys", "values", "positions", "queries", "query_positions", "attention", "log_votes", "pinned", "regions")
    own = {name: getattr(view, name) for name in (*names, "valid", "lengths", "age", "protected", "candidates")}
    own.update(view.slot_state)
    own.update({f"{name} of the row": state for name, state in view.row_state.items()})
    if view.queries is not None:
        own["logits"] = view.logits
    if view.rotary is not None:
        own["frequencies of the rotation"] = view.rotary.frequencies
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def tensors_of_query_logits(query_logits: QueryLogits, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a plugin sees of a forward, and its own state."""
    seen = {
        "logits": query_logits.logits,
        "log_votes": query_logits.log_votes,
        "own": query_logits.own,
        "probabilities": query_logits.probabilities,
    }
    return {name: tensor for name, tensor in (seen | dict(state)).items() if tensor is not None}


def tensors_of_prompt(prompt: Prompt) -> dict[str, Tensor]:
    """Everything in a prompt that a scorer could write to."""
    return {"tokens": prompt.tokens, "protected": prompt.protected}


def tensors_of_request(request: ReadRequest) -> dict[str, Tensor]:
    """Everything in a request that a reader could write to."""
    own = {name: getattr(request, name) for name in ("queries", "query_positions", "positions", "packed_lengths")}
    columns = {f"{name} of the keys": one for name, one in request.packed.items()}
    pages = {f"{name} of the pages": one for name, one in request.pages.items()}
    return {name: tensor for name, tensor in (own | columns | pages).items() if tensor is not None}


def _writes(tensor: Tensor) -> int:
    """How often a tensor, or one that shares its memory, was written to in place; not known in inference mode."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other count of writes


def _same(tensor: Tensor, copy: Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
        return False
    return bool(torch.isclose(tensor, copy, rtol=0, atol=0, equal_nan=True).all())
