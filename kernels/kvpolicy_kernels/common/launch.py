"""One launch of a kernel as data: it can be run, or compiled without a GPU."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels.common.compile_spec import Build
from kvpolicy_kernels.common.support import interpreting

_TYPES = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


@attrs.frozen(eq=False)
class Launch:
    """A kernel with all its arguments by name; an argument that is None is a constant."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Launch it, or interpret it."""
        launcher = self.kernel[self.grid]
        launcher(**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)

    def build(self, name: str, *, tensor_cores: bool = False, wide_loads: bool = True) -> Build:
        """The same to be compiled; tensors may be on the meta device."""
        types = {key: type_of(given) for key, given in self.arguments.items() if given is not None}
        constants = {**self.constants, **{key: None for key, given in self.arguments.items() if given is None}}
        tensors = tuple(key for key, given in self.arguments.items() if isinstance(given, Tensor))
        return Build(name, self.kernel, types, constants, tensors, self.warps, self.stages, tensor_cores, wide_loads)


def trips_of(count: int) -> int | None:
    """The constant bound of a loop for the interpreter, which cannot count to a tensor; None where kernels compile."""
    return count if interpreting() else None


def type_of(given: Any) -> Any:
    """Triton's type of an argument."""
    if isinstance(given, Tensor):
        return _TYPES[given.dtype]
    if isinstance(given, tuple):
        return tuple(map(type_of, given))
    return "fp32" if isinstance(given, float) else "i32"
