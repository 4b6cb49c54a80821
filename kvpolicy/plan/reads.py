"""Which columns a scorer reads: it is run once on a small view and watched, so third parties need not declare it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvpolicy.stages import Geometry, Scorer, View

_ONLY_METADATA = frozenset({"__get__", "size", "dim", "numel", "stride", "is_floating_point"})
_SLOTS = 16  # of the small view, on top of the observation window


@attrs.frozen
class Reads:
    """The columns that a scorer reads; `error` when it could not be run, and may read all of them."""

    columns: tuple[str, ...]
    error: str = ""


def reads_of(scorer: Scorer, geometry: Geometry) -> Reads:
    """Run `scorer` on a view of few slots with the given geometry, on the CPU, and note what its operations touch."""
    view = small_view({"": scorer}, geometry)
    watch = _Watch(_tensors_by_column(view))
    try:
        with watch, torch.no_grad():
            _run(scorer, view)
    except Exception as error:  # noqa: BLE001 - a third party's scorer: the plan can still be explained
        return Reads(tuple(_tensors_by_column(view)), f"{type(error).__name__}: {error}")
    return Reads(tuple(name for name in watch.columns if name in watch.touched))


def _run(scorer: Scorer, view: View) -> None:
    fresh = scorer.observe(view)
    scorer.score(attrs.evolve(view, slot_state={**view.slot_state, **fresh}) if fresh else view)


class _Watch(TorchFunctionMode):
    """Notes each column whose storage is an argument of an operation; a view of a column shares its storage."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.columns = columns
        self.touched: set[str] = set()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in columns.items()}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _ONLY_METADATA:
            storages = (tensor.untyped_storage().data_ptr() for tensor in _tensors([args, kwargs or {}]))
            self.touched.update(self._names[one] for one in storages if one in self._names)
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


def small_view(
    scorers: Mapping[str, Scorer],
    geometry: Geometry,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> View:
    """One row of few random entries, with all that these scorers need; the names of slot state begin with the keys."""
    needs = [scorer.needs() for scorer in scorers.values()]
    window = max(need.queries for need in needs)
    heads, dim, slots = geometry.kv_heads, geometry.head_dim, _SLOTS + window
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    mass = (
        torch.rand(1, heads, slots, geometry.group, dtype=torch.float32, generator=random).to(device).transpose(-1, -2)
    )
    fills = {prefix + one.name: one.fill for prefix, scorer in scorers.items() for one in scorer.slot_state()}
    return View(
        keys=normal(1, heads, slots, dim),
        values=normal(1, heads, slots, dim),
        positions=torch.arange(slots, dtype=torch.int32, device=device).repeat(1, heads, 1),
        geometry=geometry,
        scaling=dim**-0.5,
        queries=normal(1, geometry.query_heads, window, dim) if window else None,
        attention=mass if any(need.attention for need in needs) else None,
        slot_state={
            name: torch.full((1, heads, slots), fill, dtype=torch.float32, device=device)
            for name, fill in fills.items()
        },
    )
