"""States as named tensors and numbers: how they are written, and how they are read back with checks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy.cache.storage.layout import PerSegment
from kvpolicy.errors import KVPolicyError, shown

Number = bool | int | float
Described = Iterator[tuple[str, Tensor | Number]]
MOST = 2**40  # largest count


def below(name: str, described: Iterable[tuple[str, Tensor | Number]]) -> Described:
    """Tensors and numbers with the prefix `name` in their names."""
    for inner, value in described:
        yield f"{name}.{inner}", value


def counts_of(numbers: PerSegment | Sequence[int]) -> Tensor:
    """Counts as an int64 tensor in host memory; empty when there are none."""
    return torch.tensor(numbers, dtype=torch.int64)


class Contents:
    """Reads named tensors and numbers, each once. Missing or invalid values raise errors.

    Tensors are given in host memory and returned on `device`; `error` makes the exceptions from messages.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, object],
        device: torch.device,
        error: Callable[[str], KVPolicyError],
    ) -> None:
        self._tensors, self._numbers = dict(tensors), dict(numbers)
        self._device, self._error, self._prefix = device, error, ""

    def below(self, name: str) -> "Contents":
        """The values whose names begin with `name`; reading them also removes them here."""
        contents = Contents({}, {}, self._device, self._error)
        contents._tensors, contents._numbers, contents._prefix = self._tensors, self._numbers, f"{self._prefix}{name}."
        return contents

    def wrong(self, name: str, message: str) -> KVPolicyError:
        """The exception for an invalid value."""
        return self._error(f"{shown(self._prefix + name)} {message}")

    def has(self, name: str) -> bool:
        """Whether there is an unread tensor with this name."""
        return self._prefix + name in self._tensors

    def size(self, name: str) -> int:
        """The length of an unread tensor [n]."""
        tensor = self._tensors.get(self._prefix + name)
        if tensor is None or tensor.ndim != 1:
            raise self.wrong(name, "is missing" if tensor is None else f"must be [n]: {list(tensor.shape)}")
        return tensor.shape[0]

    def tensor(self, name: str, dtype: torch.dtype | None, shape: Sequence[int | None]) -> Tensor:
        """A tensor with this dtype (None = any floating point dtype) and shape (None = any size)."""
        tensor = self._host(name, shape)
        if tensor.dtype != dtype and (dtype is not None or not tensor.is_floating_point()):
            raise self.wrong(name, f"must be {dtype or 'floating point'}: {tensor.dtype}")
        return tensor.to(self._device)

    def counts(self, name: str, shape: Sequence[int | None]) -> list[int]:
        """Integers >= 0 from an int64 tensor, flattened."""
        tensor = self._host(name, shape)
        if tensor.dtype != torch.int64 or bool(((tensor < 0) | (tensor > MOST)).any()):
            raise self.wrong(name, f"must be whole numbers from 0 to {MOST}")
        numbers: list[int] = tensor.flatten().tolist()
        return numbers

    def table(self, name: str, rows: int, heads: int) -> PerSegment:
        """An integer >= 0 per segment."""
        numbers = self.counts(name, (rows, heads))
        return tuple(tuple(numbers[row * heads : (row + 1) * heads]) for row in range(rows))

    def flag(self, name: str) -> bool:
        """A bool."""
        value = self._number(name)
        if not isinstance(value, bool):
            raise self.wrong(name, f"must be true or false: {shown(value)}")
        return value

    def integer(self, name: str, most: int = MOST) -> int:
        """An integer from 0 to `most`."""
        value = self._number(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self.wrong(name, f"must be a whole number from 0 to {most}: {shown(value)}")
        return value

    def number(self, name: str) -> float:
        """A number of magnitude at most `MOST`."""
        value = self._number(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MOST <= value <= MOST:
            raise self.wrong(name, f"must be a number from -{MOST} to {MOST}: {shown(value)}")
        return float(value)

    def require_all_read(self) -> None:
        """Raise an error if a tensor or number is unread, because no object has this state."""
        for name in [*self._tensors, *self._numbers]:
            raise self._error(f"{shown(name)} does not belong there")

    def _host(self, name: str, shape: Sequence[int | None]) -> Tensor:
        tensor = self._tensors.pop(self._prefix + name, None)
        if tensor is None:
            raise self.wrong(name, "is missing")
        sizes = list(tensor.shape)
        if len(sizes) != len(shape) or any(n not in (None, size) for n, size in zip(shape, sizes, strict=True)):
            expected = ", ".join("n" if n is None else str(n) for n in shape)
            raise self.wrong(name, f"must be [{expected}]: {sizes}")
        return tensor

    def _number(self, name: str) -> object:
        if self._prefix + name not in self._numbers:
            raise self.wrong(name, "is missing")
        return self._numbers.pop(self._prefix + name)
