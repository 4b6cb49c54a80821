"""One build compiled for one target."""

import importlib.metadata
import importlib.util
from typing import Any

import attrs

from kvpolicy.errors import InputError, KVPolicyError
from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.support import interpreting
from tests.compiled_kernels.ptx import instructions_of
from tests.compiled_kernels.resources import resources_of

CAPABILITIES = (80, 90, 100)
_DIVISIBLE = [["tt.divisibility", 16]]


class BuildError(KVPolicyError):
    """A kernel does not compile for a target, or what was compiled cannot be examined."""


@attrs.frozen
class Compiled:
    """What became of a build on one target. Counts are of instructions in the code, not of executions."""

    name: str
    capability: int  # 90 for sm_90
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per program
    wide_loads: int
    narrow_loads: int
    async_copies: int
    tensor_cores: dict[str, int]


def require_compiler() -> None:
    """Raise InputError where Triton cannot compile: it is not there, or was told to interpret."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed: kernels cannot be compiled")
    if interpreting():
        raise InputError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")


def compiler_version() -> str:
    """Of Triton."""
    return importlib.metadata.version("triton")


def compile_build(build: CompileSpec, capability: int) -> Compiled:
    """Compile for sm_`capability`; needs no GPU.

    Raises:
        InputError: nothing can be compiled in this process.
        BuildError: the compiler refuses this build, or its result cannot be examined.
    """
    require_compiler()
    try:
        made = assemble(build, capability)
        resources = resources_of(made.asm["cubin"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip()
        raise BuildError(f"{build.name}, sm_{capability}: does not compile: {reason}") from error
    counts = {**attrs.asdict(resources), **attrs.asdict(instructions_of(made.asm["ptx"]))}
    return Compiled(build.name, capability, build.warps, shared=made.metadata.shared, **counts)


def assemble(build: CompileSpec, capability: int) -> Any:
    """Triton's own result: `asm` by language, `metadata`. Raises whatever the compiler raises."""
    import triton  # noqa: PLC0415 - kvpolicy works without Triton
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    source = ASTSource(
        fn=build.kernel,
        signature=_signature(build),
        constexprs=dict(build.constants),
        attrs={(build.kernel.arg_names.index(name),): _DIVISIBLE for name in build.aligned},
    )
    # Said outright, because 3.9 warns when the environment leaves it open.
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _signature(build: CompileSpec) -> dict[str, Any]:
    """Types in the order of the kernel's parameters, each of which must be named exactly once."""
    given = {**build.types, **dict.fromkeys(build.constants, "constexpr")}
    names = list(build.kernel.arg_names)
    if sorted(given) != sorted(names) or len(given) != len(build.types) + len(build.constants):
        raise ValueError(f"names {sorted(given)}, the kernel has {sorted(names)}")
    return {name: given[name] for name in names}
