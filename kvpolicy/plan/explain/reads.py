"""Which columns a scorer reads: it is run once on a small view and watched, so third parties need not declare it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvpolicy.errors import described
from kvpolicy.plan.small_view import small_view
from kvpolicy.stages import Geometry, Scorer, View

_ONLY_METADATA = frozenset({"__get__", "size", "dim", "numel", "stride", "is_floating_point"})


@attrs.frozen
class Reads:
    """The columns that a scorer reads; `error` when it could not be run, and may read all of them."""

    columns: tuple[str, ...]
    error: str = ""


def reads_of(scorer: Scorer, geometry: Geometry) -> Reads:
    """Run `scorer` on a view of few slots with the given geometry, on the CPU, and note what its operations touch."""
    view = small_view({"": scorer}, geometry)
    columns = _tensors_by_column(view)
    watch = _Watch(columns)
    try:
        with watch, torch.no_grad():
            _run(scorer, view)
    except Exception as error:  # noqa: BLE001 - a third party's scorer: the plan can still be explained
        return Reads(tuple(columns), described(error))
    return Reads(tuple(name for name in columns if name in watch.touched))


def _run(scorer: Scorer, view: View) -> None:
    observed = scorer.observe(view)
    scorer.score(attrs.evolve(view, slot_state={**view.slot_state, **observed}) if observed else view)


class _Watch(TorchFunctionMode):
    """Notes each column whose storage is an argument of an operation; a view of a column shares its storage."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.touched: set[str] = set()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in columns.items()}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _ONLY_METADATA:
            pointers = {tensor.untyped_storage().data_ptr() for tensor in _tensors([args, kwargs or {}])}
            self.touched.update(self._names[pointer] for pointer in pointers & self._names.keys())
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _tensors_by_column(view: View) -> dict[str, Tensor]:
    named = {name: getattr(view, name) for name in ("keys", "values", "positions", "queries", "attention")}
    return {name: tensor for name, tensor in (named | dict(view.slot_state)).items() if tensor is not None}
