"""Compiles everything, on several processes, and judges it."""

import functools
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import attrs

from kvpolicy_kernels.common.compile_spec import CompileSpec
from tests.compiled_kernels.discover import all_builds
from tests.compiled_kernels.gates import faults_of
from tests.compiled_kernels.target import CAPABILITIES, BuildError, Compiled, compile_build, require_compiler


@attrs.frozen
class CompiledKernels:
    """Everything that compiled, in the order of the builds, and everything that is wrong."""

    compiled: tuple[Compiled, ...]
    faults: tuple[str, ...]


def compile_all(
    jobs: int, progress: Callable[[int, str], None], names: Sequence[str] = (), *, few: bool = False
) -> CompiledKernels:
    """Compile every build, or those whose name starts with one of `names`, for every capability.

    `few`: only the first of them of each kernel, for one capability in turn. `progress` is told how many there are, and
    what was done last ("" at the start). The compiler's cache is not used: it knows a tuple of functions by their names
    only. Raises InputError when nothing can be compiled here.
    """
    require_compiler()
    builds = all_builds()
    tasks = _tasks(builds, names, few=few)
    progress(len(tasks), "")
    with tempfile.TemporaryDirectory(prefix="kvpolicy-compiled-") as cache:
        spawn = multiprocessing.get_context("spawn")  # a child of a process with threads must not be a fork
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_use_cache, initargs=(cache,)) as pool:
            futures = {pool.submit(_compile, *task): task for task in tasks}
            results: dict[tuple[int, int], Compiled | str] = {}
            for future in as_completed(futures):
                index, capability = futures[future]
                results[index, capability] = future.result()
                progress(len(tasks), f"{builds[index].name}, sm_{capability}")
    return _outcome(builds, [(index, results[index, capability]) for index, capability in tasks])


def _tasks(builds: Sequence[CompileSpec], names: Sequence[str], *, few: bool) -> list[tuple[int, int]]:
    """Indices of builds, and capabilities."""
    chosen = [index for index, build in enumerate(builds) if not names or build.name.startswith(tuple(names))]
    if few:
        first = {builds[index].kernel: index for index in reversed(chosen)}
        return list(zip(sorted(first.values()), itertools.cycle(CAPABILITIES), strict=False))
    return [(index, capability) for index in chosen for capability in CAPABILITIES]


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _compile(index: int, capability: int) -> Compiled | str:
    try:
        return compile_build(_builds()[index], capability)
    except BuildError as error:
        return str(error)


@functools.cache
def _builds() -> tuple[CompileSpec, ...]:
    return all_builds()


def _outcome(builds: Sequence[CompileSpec], results: Sequence[tuple[int, Compiled | str]]) -> CompiledKernels:
    compiled, faults = [], []
    for index, result in results:
        if isinstance(result, str):
            faults.append(result)
        else:
            compiled.append(result)
            faults.extend(faults_of(builds[index], result))
    return CompiledKernels(tuple(compiled), tuple(faults))
