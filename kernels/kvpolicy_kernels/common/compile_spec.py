"""What `triton.compile` needs to compile a kernel without a GPU, and what the result must satisfy."""

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen(eq=False)
class CompileSpec:
    """One kernel with the types and constants of a real launch."""

    name: str  # of the row in the table of compiled kernels: the kernel, then what is special about this launch
    kernel: Any  # the `@triton.jit` function
    types: Mapping[str, Any]  # Triton types of the run-time arguments: "*i64", "*fp32", "i32", ("fp32",) for a tuple
    constants: Mapping[str, Any]  # of the `tl.constexpr` parameters
    aligned: tuple[str, ...] = ()  # arguments that are divisible by 16 at launch
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False  # whether the compiled kernel must use tensor cores
    wide_loads: bool = True  # whether it must load 16 bytes per thread
