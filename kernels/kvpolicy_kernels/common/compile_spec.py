"""What is compiled, without a GPU, to prove that a kernel has no spills and no lost vector loads."""

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen(eq=False)
class Build:
    """One kernel with the types and constants of one real launch."""

    name: str  # of the row in the table: kernel, then what makes this build special
    kernel: Any  # the `@triton.jit` function
    types: Mapping[str, Any]  # Triton types of the run-time arguments: "*i64", "*fp32", "i32", ("fp32",) for a tuple
    constants: Mapping[str, Any]  # of the `tl.constexpr` parameters
    aligned: tuple[str, ...] = ()  # arguments that a launch finds divisible by 16
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False  # whether the kernel must use them
    wide_loads: bool = True  # whether it must load 16 bytes at a time
