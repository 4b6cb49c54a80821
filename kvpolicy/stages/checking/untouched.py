"""Checks that a plugin does not write to its inputs. Used by the conformance suite, and at run time in debug mode."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.contracts import Plugin, ReadRequest
from kvpolicy.stages.prompt_passes import Prompt
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.view import View

DEBUG = "KVPOLICY_DEBUG"


def debugging() -> bool:
    """Whether `KVPOLICY_DEBUG=1` is set: inputs of plugins are copied and compared."""
    return os.environ.get(DEBUG, "") not in ("", "0")


@contextmanager
def watching(plugin: Plugin, inputs: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """In debug mode, `untouched` for the tensors that `inputs` returns; otherwise does nothing."""
    if not debugging():
        yield
        return
    with untouched(plugin, inputs()):
        yield


@contextmanager
def untouched(plugin: Plugin, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Check that a plugin does not write to tensors while it is called.

    Raises:
        PluginContractError: names the plugin and a tensor whose values have changed, or that was written to in place,
            even with the same values.
    """
    before = {name: (tensor, tensor.clone(), _write_count(tensor)) for name, tensor in inputs.items()}
    yield
    for name, (tensor, snapshot, write_count) in before.items():
        if not _same(tensor, snapshot) or _write_count(tensor) != write_count:
            raise contract_error(plugin, f"changed its input {name!r}, expected it to be read only")


def tensors_of(view: View) -> dict[str, Tensor]:
    """All tensors of a view, including those that it computes from its entries."""
    given = ("keys", "values", "positions", "queries", "query_positions", "attention", "log_votes", "pinned", "regions")
    computed = ("valid", "lengths", "age", "protected", "candidates")
    tensors = {name: getattr(view, name) for name in (*given, "region_spans", *computed)}
    tensors.update(view.slot_state)
    tensors.update({f"{name} of the row": state for name, state in view.row_state.items()})
    tensors.update({f"{name} of the calibration": tensor for name, tensor in view.calibration.items()})
    if view.queries is not None:
        tensors["logits"] = view.logits
    if view.rotary is not None:
        tensors["frequencies of the rotation"] = view.rotary.frequencies
    if view.output_projection is not None:
        tensors["output projection"] = view.output_projection
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def tensors_of_query_logits(query_logits: QueryLogits, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the logits of a forward, and the slot state of the plugin."""
    tensors = {
        "logits": query_logits.logits,
        "log_votes": query_logits.log_votes,
        "own": query_logits.own,
        "probabilities": query_logits.probabilities,
        "output norms": query_logits.output_norms,
        "hidden norms": query_logits.hidden_norms,
    }
    return {name: tensor for name, tensor in (tensors | dict(state)).items() if tensor is not None}


def tensors_of_prompt(prompt: Prompt) -> dict[str, Tensor]:
    """Everything in a prompt that a scorer could write to."""
    return {"tokens": prompt.tokens, "protected": prompt.protected}


def tensors_of_request(request: ReadRequest) -> dict[str, Tensor]:
    """All tensors of a read request."""
    tensors = {name: getattr(request, name) for name in ("queries", "query_positions", "positions", "packed_lengths")}
    columns = {f"{name} of the keys": column for name, column in request.packed.items()}
    pages = {f"{name} of the pages": column for name, column in request.pages.items()}
    newest = {f"{name} of the newest page": column for name, column in request.newest_page.items()}
    return {name: tensor for name, tensor in (tensors | columns | pages | newest).items() if tensor is not None}


def _write_count(tensor: Tensor) -> int:
    """Number of in-place writes to the memory of a tensor; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no public counter


def _same(tensor: Tensor, snapshot: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if tensor.shape != snapshot.shape or tensor.dtype != snapshot.dtype:
        return False
    return bool(torch.isclose(tensor, snapshot, rtol=0, atol=0, equal_nan=True).all())
