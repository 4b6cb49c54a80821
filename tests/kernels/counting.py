"""Counts the bytes that kernels address under the interpreter, by tensor."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from kvpolicy_kernels import Traffic


@contextmanager
def counted(tensors: Mapping[str, Tensor | tuple[Tensor, ...]]) -> Iterator[Traffic]:
    """Traffic of the launches inside the block, by name; loads and stores that touch no named tensor are left out.

    Elements under a false mask are not counted, nor are atomic operations. Only interpreted launches can be counted.
    """
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    ranges = _ranges(tensors)

    def note(into: dict[str, int], pointers: Any, mask: Any) -> None:
        addresses = np.atleast_1d(np.asarray(pointers.data).astype(np.uint64)).ravel()
        if mask is not None:
            flags = np.broadcast_to(np.asarray(mask.data).astype(bool), np.asarray(pointers.data).shape).ravel()
            addresses = addresses[flags]
        size = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
        for name, (low, high) in ranges:
            hits = int(((addresses >= low) & (addresses < high)).sum())
            if hits:
                into[name] = into.get(name, 0) + hits * size

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note(read, ptrs, mask)
        return load(self, ptrs, mask, *rest, **named)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note(written, ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **named)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    try:
        yield Traffic(read, written)
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def _ranges(tensors: Mapping[str, Tensor | tuple[Tensor, ...]]) -> list[tuple[str, tuple[int, int]]]:
    found = []
    for name, given in tensors.items():
        for tensor in (given,) if isinstance(given, Tensor) else given:
            low = tensor.data_ptr()
            found.append((name, (low, low + tensor.numel() * tensor.element_size())))
    return found
