"""What every compiled kernel must keep to."""

from kvpolicy_kernels.common.compile_spec import CompileSpec
from tests.compiled_kernels.target import Compiled

_SHARED = {80: 163, 90: 227, 100: 227}  # KiB that one program may have: CUDA C++ Programming Guide, table of features


def faults_of(build: CompileSpec, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled build; empty when it passes."""
    faults = []
    if compiled.stack:
        faults.append(f"{compiled.stack} bytes of stack: registers are spilt")
    if compiled.shared > _SHARED[compiled.capability] * 1024:
        faults.append(f"{compiled.shared} bytes of shared memory, {_SHARED[compiled.capability]} KiB exist")
    if build.wide_loads and not compiled.wide_loads:
        faults.append("no load of 16 bytes")
    if build.tensor_cores and not compiled.tensor_cores:
        faults.append("no tensor cores")
    return [f"{compiled.name}, sm_{compiled.capability}: {fault}" for fault in faults]
