"""A policy compiled for one model geometry, device and dtype."""

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from kvpolicy.errors import CalibrationError, ParameterError, PolicyError, Problem, UnsupportedModelError, one_line
from kvpolicy.plan.budgets import Budgets
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.chunk_observers import ChunkObserver, chunk_observers_of, most_queries
from kvpolicy.plan.compress.fusion import Fusion, fusion_of
from kvpolicy.plan.compress.warm_up import warm_up
from kvpolicy.plan.footprint import Footprint
from kvpolicy.plan.forward_observers import ATTENTION, ForwardObserver, forward_observers_of, observing_plugins
from kvpolicy.plan.passes import PassObserver, pass_observers_of
from kvpolicy.spec.policy import NEVER, PolicySpec
from kvpolicy.stages import Column, Format, Formats, Geometry, JointAllocator, Needs, Plugin, Rotary, Site, ViewPlugin
from kvpolicy.stages.checking.declared import (
    any_order_of,
    flag_of,
    formats_of,
    needs_of,
    pages_of,
    row_state_of,
    slot_state_of,
)
from kvpolicy.stages.registry.plugins import registry
from kvpolicy_kernels import unavailable_reason

POSITIONS = "positions"
LOG_VOTES = "log_votes"
READ_ALL = "all"  # the reader that leaves attention as it is


@attrs.frozen(eq=False)
class Plan:
    """What the runtime executes; immutable, so that caches and threads may share it."""

    spec: PolicySpec
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    rotary: Rotary | None
    needs: Needs
    columns: dict[str, Column]  # what one slot of one KV head carries beside its key and value
    formats: tuple[Formats, ...]  # how each managed layer holds its keys and values
    page_formats: tuple[Format | None, ...]  # what the reader keeps per page, for each managed layer
    observers: tuple[ForwardObserver, ...]
    budgets: Budgets
    fusion: Fusion  # which stages run in kernels, and why others do not
    chunk_observers: tuple[ChunkObserver, ...] = ()  # scorers that are shown the queries of each chunk
    passes: tuple[PassObserver, ...] = ()  # scorers that read a prompt again before it is compressed
    calibration: str = ""  # digest of what plugins were calibrated with, "" when they need nothing
    calibrations: tuple[Mapping[str, Tensor], ...] = ()  # what views of a layer show; names begin with a plugin's key

    @cached_property
    def ragged(self) -> bool:
        """Whether the heads of a layer may hold different numbers of entries."""
        return self.spec.allocate.divider.ragged

    @cached_property
    def selective(self) -> bool:
        """Whether decode steps may attend to less than all that is held."""
        return registry().identity(type(self.spec.read)) != READ_ALL  # another's reader may have that name, too

    def wants_order(self, ordinal: int) -> bool:
        """Whether pads must not stand between entries once a forward is over: they would leave a mark on a group."""
        forms = self.formats[ordinal]
        return self.selective or bool(forms.keys.columns or forms.values.columns)

    @cached_property
    def kernels(self) -> bool:
        """Whether Triton kernels run where they can; else torch does."""
        return not self.fusion.absent

    @cached_property
    def packs(self) -> bool:
        """Whether anything is ever held that is made of several entries, packed vectors or pages."""
        return self.selective or self.packs_vectors

    @cached_property
    def packs_vectors(self) -> bool:
        """Whether keys or values are ever packed."""
        return any(forms.keys.columns or forms.values.columns for forms in self.formats)

    @cached_property
    def chunk_queries(self) -> int:
        """How many queries of a chunk that is not complete are held at most."""
        return most_queries(self.chunk_observers)

    @cached_property
    def keeps_chunk_queries(self) -> bool:
        """Whether they are held behind a compression and while decoding, too, and not only while a prompt comes."""
        return _keeps_chunk_queries(self.spec)

    @cached_property
    def compresses_jointly(self) -> bool:
        """Whether layers compete: every compression is then one of all layers, when a forward is over for all."""
        return isinstance(self.spec.allocate.divider, JointAllocator)

    @cached_property
    def views_are_copies(self) -> bool:
        """Whether showing a layer to plugins takes a copy of its entries: then one is shown after the other."""
        return self.ragged or self.packs

    @cached_property
    def fills_holes(self) -> bool:
        """Whether the last of the kept entries fill the holes that a decode step leaves: few move, but out of order.

        Kernels that choose entries take recency and ties by slot; heads of different lengths are laid out anew anyway.
        """
        indifferent = all(weighted.scorer.in_any_order() for weighted in self.spec.score)
        moves_only = self.spec.merge.moves_only and not self.packs and not self.ragged
        return indifferent and moves_only and self.compresses_while_decoding and bool(self.fusion.off)

    def first(self, layers: int) -> "Plan | None":
        """The plan for the model's first `layers` layers; None when it manages none of them."""
        geometry = self.geometry
        managed = tuple(index for index in geometry.managed if index < layers)
        if not managed:
            return None
        shorter = attrs.evolve(geometry, managed=managed)
        formats, pages = self.formats[: len(managed)], self.page_formats[: len(managed)]
        footprint = attrs.evolve(self.footprint, geometry=shorter, formats=formats, pages=pages)
        budgets = Budgets(self.spec, shorter, footprint)
        return attrs.evolve(self, geometry=shorter, formats=formats, page_formats=pages, budgets=budgets)

    @property
    def footprint(self) -> Footprint:
        """The bytes that entries take."""
        return self.budgets.footprint

    @cached_property
    def compresses_while_decoding(self) -> bool:
        """False when the policy is for prompts only (`every: never`), and when it keeps everything."""
        return self.spec.compress.every != NEVER and not self.budgets.keeps_everything

    def capacity(self, ordinal: int, seen: int, min_entries: int = 0) -> int:
        """Slots per KV head up to which the managed layer number `ordinal` may grow: its budget and the slack.

        `min_entries` are those that spans of the request protect.
        """
        if not self.compresses_while_decoding:
            return sys.maxsize
        return max(self.budgets.ahead(seen, min_entries)[ordinal], min_entries) + self.budgets.slack

    def capacities(self, seen: int) -> Sequence[int]:
        """The same for all managed layers, where no spans are protected."""
        if not self.compresses_while_decoding:
            return (sys.maxsize,) * self.geometry.layers
        slack = self.budgets.slack
        return [entries + slack for entries in self.budgets.ahead(seen)]

    def capacity_behind_eviction(self, ordinal: int, seen: int, min_entries: int = 0) -> int:
        """The same where entries have just been evicted: of a joint budget, one layer may get the share of others."""
        if not self.compresses_while_decoding or not self.compresses_jointly:
            return self.capacity(ordinal, seen, min_entries)
        return max(sum(self.budgets.ahead(seen, min_entries)), min_entries) + self.budgets.slack


def compile_policy(
    spec: PolicySpec,
    geometry: Geometry,
    device: torch.device | str,
    dtype: torch.dtype,
    rotary: Rotary | None = None,
    calibration: Calibration | None = None,
    *,
    kernels: bool | None = None,
) -> Plan:
    """Fit a policy to a model.

    Raises PolicyError or UnsupportedModelError when the two do not go together, CalibrationError when the calibration
    is none of the policy's store for such a model.

    `kernels` says whether Triton kernels are used; by default where there is a GPU for them.
    """
    device, dtype = _device(device), _floating(dtype)
    _check_declared(spec)
    _check_rotary(spec, rotary)
    sites = _sites(spec, geometry, dtype, rotary, calibration)
    formats = tuple(_formats(spec, site) for site in sites)
    pages = tuple(_pages(spec, site) for site in sites)
    columns, needs = _columns(spec, geometry), _needs(spec)
    chunk_observers = chunk_observers_of(spec)
    queries = needs.queries + (most_queries(chunk_observers) if _keeps_chunk_queries(spec) else 0)
    states, uneven = len(spec.merge.row_state()), spec.allocate.divider.ragged or spec.allocate.layers.name != "uniform"
    footprint = Footprint(geometry, dtype, columns, formats, pages, queries, states, uneven)
    return Plan(
        spec=spec,
        geometry=geometry,
        device=device,
        dtype=dtype,
        rotary=rotary,
        needs=needs,
        columns=columns,
        formats=formats,
        page_formats=pages,
        observers=forward_observers_of(spec),
        chunk_observers=chunk_observers,
        passes=pass_observers_of(spec),
        budgets=Budgets(spec, geometry, footprint),
        fusion=_fusion(spec, geometry, device, dtype, kernels),
        calibration=calibration.digest if spec.calibrated and calibration is not None else "",
        calibrations=_shown(spec, calibration, device) if calibration is not None else ({},) * geometry.layers,
    )


def _check_declared(spec: PolicySpec) -> None:
    """Raise PluginContractError for plugins that say of themselves what makes no sense."""
    for weighted in spec.score:
        any_order_of(weighted.scorer)
    row_state_of(spec.merge)
    for weighted in spec.score:
        flag_of(weighted.scorer, "calibrated")
        flag_of(weighted.scorer, "layers_as_rows")
    for plugin, names in (
        (spec.allocate.divider, ("ragged", "exact", "reads_scores", "reads_window", "calibrated")),
        (spec.allocate.layers, ("follows_length",)),
        (spec.select, ("best", "layers_as_rows")),
        (spec.merge, ("moves_only", "votes", "reads_window", "layers_as_rows")),
        (spec.store, ("joint", "calibrated")),
        (spec.read, ("summarises_newest",)),
    ):
        for name in names:
            flag_of(plugin, name)


def needs_rotary(spec: PolicySpec) -> bool:
    """Whether the rotary embedding of the model must be known, apart from what the store needs."""
    return bool(readers_of(spec, "rotary"))


def readers_of(spec: PolicySpec, need: str) -> dict[str, ViewPlugin]:
    """The plugins that have a need that is true or false, such as `output_projection`, by their keys in the file."""
    return {key: plugin for key, plugin in spec.shown_views.items() if getattr(needs_of(plugin), need)}


def _check_rotary(spec: PolicySpec, rotary: Rotary | None) -> None:
    if rotary is not None:
        return
    problems = [
        Problem(place, f"{plugin.name} needs the rotary embedding of the model, to undo it: it is not known")
        for place, plugin in readers_of(spec, "rotary").items()
    ]
    if problems:
        raise PolicyError(problems)


def _fusion(
    spec: PolicySpec, geometry: Geometry, device: torch.device, dtype: torch.dtype, kernels: bool | None
) -> Fusion:
    off = unavailable_reason(device) if kernels is None else "" if kernels else "kernels are switched off"
    fusion = fusion_of(spec, off)
    here = device.type == "cpu" or torch.cuda.is_available()  # a plan may be for a device that is elsewhere
    return warm_up(spec, fusion, geometry, device, dtype) if here and not off else fusion


def _sites(
    spec: PolicySpec, geometry: Geometry, dtype: torch.dtype, rotary: Rotary | None, calibration: Calibration | None
) -> Sequence[Site]:
    """Where the store is used, once all that plugins were calibrated with has been looked at."""
    calibrated = spec.calibrated
    if calibrated and calibration is None:
        message = f"needs a calibration for this model: kvpolicy calibrate {spec.name} --model MODEL --text FILE"
        raise PolicyError([Problem(key, f"{plugin.name} {message}") for key, plugin in calibrated.items()])
    if calibration is not None and len(calibration.layers) != geometry.layers:
        message = f"the calibration is for {len(calibration.layers)} layers, not {geometry.layers}"
        raise PolicyError([Problem(key, message) for key in calibrated or ("store",)])
    sites = [Site(geometry, dtype, layer, rotary) for layer in range(geometry.layers)]
    if calibration is None:
        return sites
    for key, plugin in calibrated.items():
        _check_calibration(plugin, _calibrated(sites, calibration, key))
    return _calibrated(sites, calibration, "store")


def _calibrated(sites: Sequence[Site], calibration: Calibration, key: str) -> list[Site]:
    return [attrs.evolve(site, calibration=tensors) for site, tensors in zip(sites, calibration.of(key), strict=True)]


def _check_calibration(plugin: Plugin, sites: Sequence[Site]) -> None:
    for site in sites:
        try:
            plugin.check_calibration(site)
        except ParameterError as error:
            message = f"the calibration of layer {site.layer} is not one of {plugin.name} for this model: {error}"
            raise CalibrationError(message) from error


def _shown(spec: PolicySpec, calibration: Calibration, device: torch.device) -> tuple[dict[str, Tensor], ...]:
    """What plugins that look at views were calibrated with, on the device of the model."""
    keys = [key for key, plugin in spec.calibrated.items() if plugin is not spec.store]
    layers: tuple[dict[str, Tensor], ...] = tuple({} for _ in calibration.layers)
    for key in keys:
        for layer, tensors in zip(layers, calibration.of(key), strict=True):
            layer.update({f"{key}.{name}": tensor.to(device) for name, tensor in tensors.items()})
    return layers


def _formats(spec: PolicySpec, site: Site) -> Formats:
    try:
        return formats_of(spec.store, site)
    except ParameterError as error:
        raise PolicyError([Problem("store", one_line(error))]) from error


def _pages(spec: PolicySpec, site: Site) -> Format | None:
    try:
        return pages_of(spec.read, site)
    except ParameterError as error:
        raise PolicyError([Problem("read", one_line(error))]) from error


def _needs(spec: PolicySpec) -> Needs:
    needs = [needs_of(plugin) for plugin in spec.shown_views.values()]
    return Needs(
        queries=max(need.queries for need in needs),
        attention=any(need.attention for need in needs),
        forward_queries=max(need.forward_queries for need in needs),
        rotary=any(need.rotary for need in needs),
        output_projection=any(need.output_projection for need in needs),
        regions=tuple(dict.fromkeys(name for need in needs for name in need.regions)),
    )


def _keeps_chunk_queries(spec: PolicySpec) -> bool:
    return spec.compress.every != NEVER


def _columns(spec: PolicySpec, geometry: Geometry) -> dict[str, Column]:
    columns = {POSITIONS: Column((), torch.int32, -1)}
    if spec.merge.votes:
        columns[LOG_VOTES] = Column((), torch.float32)
    if _needs(spec).attention:
        columns[ATTENTION] = Column((geometry.group,), torch.float32)
    for plugin, prefix in observing_plugins(spec):
        for state in slot_state_of(plugin):
            columns[prefix + state.name] = Column((), torch.float32, state.fill)
    return columns


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedModelError(f"unknown device: {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(f"device must be cpu or cuda: {str(name)!r}")
    return device


def _floating(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UnsupportedModelError(f"dtype must be float32, bfloat16, float16 or float64: {dtype}")
    return dtype
