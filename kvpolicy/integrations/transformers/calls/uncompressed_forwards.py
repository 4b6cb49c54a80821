"""Forwards that the policy did not reach: counted, and said once."""

import warnings

from kvpolicy.errors import UncompressedWarning

_REMEDY = "pass past_key_values=attachment.cache(), or use_cache=False"


class UncompressedForwards:
    """What an attachment notes of forwards that went past its caches."""

    def __init__(self) -> None:
        self.forwards = 0  # of the attached model, that filled or used another cache
        self._warned = False

    def note(self, what: str) -> None:
        """Count a forward, and warn of it if it is the first."""
        self.forwards += 1
        self.warn(what)

    def warn(self, what: str) -> None:
        """Say once that something goes on uncompressed."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"{what}; {_REMEDY}", UncompressedWarning, stacklevel=3)
