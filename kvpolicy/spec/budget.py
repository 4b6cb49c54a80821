"""Budgets (tokens, a share of the tokens seen or generated, or bytes) and shares of a budget."""

import re
from fractions import Fraction

import attrs

from kvpolicy.stages.parameters import LARGEST

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MOST_BYTES = 2**60
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?) ?%", re.ASCII)
_GENERATED = re.compile(_PERCENT.pattern + " of generated", re.ASCII)
_BYTES = re.compile(r"(\d{1,18}(?:\.\d{1,6})?) ?(B|[KMG]i?B)", re.ASCII)


@attrs.frozen
class Budget:
    """Entries kept per KV head, averaged over layers and heads. Exactly one of the four fields is set.

    `share` is a fraction of the tokens seen so far. `generated` is a fraction of those that are not protected, in the
    prompt, in regions or as recent: it is kept beside the protected ones (RPC, arXiv:2505.13866). `size` is in bytes
    for one sequence and covers the entries of all managed layers, the slack of `compress.every`, the observation
    windows and the state of plugins.
    """

    tokens: int | None = None
    share: Fraction | None = None
    size: int | None = None
    generated: Fraction | None = None  # below 1

    @classmethod
    def parse(cls, value: object) -> "Budget | None":
        """`1024`, `"10%"`, `"25% of generated"` or `"2GiB"`; None when `value` is none of these."""
        if type(value) is int:
            return cls(tokens=value) if 1 <= value <= LARGEST else None
        if not isinstance(value, str):
            return None
        if match := _PERCENT.fullmatch(value):
            share = Fraction(match[1]) / 100
            return cls(share=share) if 0 < share <= 1 else None
        if match := _GENERATED.fullmatch(value):
            share = Fraction(match[1]) / 100
            return cls(generated=share) if 0 < share < 1 else None
        if match := _BYTES.fullmatch(value):
            size = int(Fraction(match[1]) * _UNITS[match[2]])
            return cls(size=size) if 1 <= size <= _MOST_BYTES else None
        return None

    def dump(self) -> int | str:
        """The YAML form; `parse` reads it back to an equal budget."""
        if self.tokens is not None:
            return self.tokens
        if self.share is not None:
            return f"{_decimal(self.share * 100)}%"
        if self.generated is not None:
            return f"{_decimal(self.generated * 100)}% of generated"
        size = self.size or 0
        for suffix in ("GiB", "MiB", "KiB"):
            if size % _UNITS[suffix] == 0:
                return f"{size // _UNITS[suffix]}{suffix}"
        return f"{size}B"

    @property
    def grows(self) -> bool:
        """Whether it is larger for longer sequences."""
        return self.share is not None or self.generated is not None

    def __str__(self) -> str:
        return str(self.dump())


@attrs.frozen
class Part:
    """A share of the budget."""

    share: Fraction  # above 0, at most 1

    @classmethod
    def parse(cls, value: object) -> "Part | None":
        """`"50%"`; None when `value` is no percentage above 0 and at most 100."""
        match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        share = Fraction(match[1]) / 100 if match else Fraction(0)
        return cls(share) if 0 < share <= 1 else None

    def of(self, entries: int) -> int:
        """This share of `entries`, rounded down."""
        return entries * self.share.numerator // self.share.denominator

    def dump(self) -> str:
        """The YAML form; `parse` reads it back to an equal part."""
        return f"{_decimal(self.share * 100)}%"

    def __str__(self) -> str:
        return self.dump()


def _decimal(value: Fraction) -> str:
    return f"{value.numerator / value.denominator:.6f}".rstrip("0").rstrip(".")
