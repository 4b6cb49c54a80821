"""Finds what there is to compile: every kernel module's builds, and the fused kernels of every installed policy."""

import importlib
import pkgutil
from collections.abc import Hashable, Iterator
from typing import Any

import attrs

import kvpolicy_kernels
from kvpolicy.errors import InputError
from kvpolicy.policy import load
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages.registry.plugins import registry
from kvpolicy_kernels import Postprocess, Tile
from kvpolicy_kernels.common.compile_spec import CompileSpec

_GEOMETRY: dict[str, Any] = {"head_dim": 128, "group": 4}  # Llama 3.1 8B: 32 query heads, 8 KV heads
_BUDGET = 1024  # entries that a share of the budget is a share of; it matters only whether there are sinks


def all_builds() -> tuple[CompileSpec, ...]:
    """Every build, each under a name of its own. Raises InputError when two that differ have one name."""
    builds: dict[str, CompileSpec] = {}
    for build in (*_of_kernels(), *_of_policies()):
        if _essence(builds.setdefault(build.name, build)) != _essence(build):
            raise InputError(f"two builds have one name: {build.name}")
    return tuple(builds.values())


def _essence(build: CompileSpec) -> Hashable:
    """What is compiled: modules may pass on the builds of others, and policies may score alike."""
    return repr(sorted(build.types.items())), repr(sorted(build.constants.items())), build.kernel, build.warps


def _of_kernels() -> Iterator[CompileSpec]:
    for about in pkgutil.walk_packages(kvpolicy_kernels.__path__, "kvpolicy_kernels."):
        module = importlib.import_module(about.name)
        if hasattr(module, "compile_specs"):
            yield from module.compile_specs()


def _of_policies() -> Iterator[CompileSpec]:
    """The fused score kernels of every installed policy; those that are compiled alike bear the names of all."""
    alike: dict[Hashable, list[CompileSpec]] = {}
    for name in registry().policies():
        for build in _of_policy(load(name).spec):
            alike.setdefault(_essence(build), []).append(build)
    for same in alike.values():
        first, *others = (build.name.rpartition(" ") for build in same)
        name = ", ".join(["".join(first), *(policy for _, _, policy in others)])
        yield attrs.evolve(same[0], name=name)


def _of_policy(spec: PolicySpec) -> Iterator[CompileSpec]:
    from kvpolicy_kernels.score import postprocess, score  # noqa: PLC0415 - they import Triton

    offered = [weighted.scorer.tile() for weighted in spec.score]
    tiles = [tile for tile in offered if isinstance(tile, Tile)]
    queries = max(weighted.scorer.needs().queries for weighted in spec.score)
    pinned = spec.protect.by_place
    if tiles:
        yield from score.compile_specs_for(
            spec.name, tiles, **_GEOMETRY, window=queries, votes=spec.merge.votes, pinned=pinned
        )
    finishes = [tile.postprocess if isinstance(tile, Tile) else Postprocess() for tile in offered]
    normalised = [
        attrs.evolve(own, normalise=weighted.normalise) for own, weighted in zip(finishes, spec.score, strict=True)
    ]
    yield from postprocess.compile_specs_for(spec.name, normalised, sinks=spec.protect.of(_BUDGET)[0], pinned=pinned)
