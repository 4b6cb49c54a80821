"""One kernel launch as data: it can be run, or turned into a specification to compile without a GPU."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import CompileSpec
from kvpolicy_kernels.common.support import interpreting

_TYPES = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


@attrs.frozen(eq=False)
class Launch:
    """A kernel, its grid and all its arguments by name. Arguments that are None become compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Launch the kernel, or interpret it."""
        launcher = self.kernel[self.grid]
        launcher(**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)

    def compile_spec(self, name: str, *, tensor_cores: bool = False, wide_loads: bool = True) -> CompileSpec:
        """The specification of this launch; tensors may be on the meta device."""
        types = {key: type_of(value) for key, value in self.arguments.items() if value is not None}
        constants = {**self.constants, **{key: None for key, value in self.arguments.items() if value is None}}
        tensors = tuple(key for key, value in self.arguments.items() if isinstance(value, Tensor))
        gates = {"tensor_cores": tensor_cores, "wide_loads": wide_loads}
        return CompileSpec(name, self.kernel, types, constants, tensors, self.warps, self.stages, **gates)


def trips_of(count: int) -> int | None:
    """A loop bound as a constant for the interpreter, which cannot loop up to a tensor; None when compiling."""
    return count if interpreting() else None


def type_of(argument: Any) -> Any:
    """Triton's type of a run-time argument."""
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype]
    if isinstance(argument, tuple):
        return tuple(map(type_of, argument))
    return "fp32" if isinstance(argument, float) else "i32"
