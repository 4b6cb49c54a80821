"""Forwards without the policy: counted, with one warning."""

import warnings

from kvpolicy.errors import UncompressedWarning

_REMEDY = "pass past_key_values=attachment.cache(), or use_cache=False"


class UncompressedForwards:
    """Counter of forwards of an attached model that did not use a cache of the attachment."""

    def __init__(self) -> None:
        self.forwards = 0  # that used another cache, or none
        self._warned = False

    def note(self, message: str) -> None:
        """Count a forward, and warn the first time."""
        self.forwards += 1
        self.warn(message)

    def warn(self, message: str) -> None:
        """Warn once that forwards are not compressed."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"{message}; {_REMEDY}", UncompressedWarning, stacklevel=3)
