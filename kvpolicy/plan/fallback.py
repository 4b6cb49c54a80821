"""What kernels cannot do is said once, and the reference runs instead."""

import logging

_logger = logging.getLogger("kvpolicy")
_noted: set[str] = set()  # in this process


def note_once(reason: str) -> None:
    """Log why a reference runs instead of a kernel; the same reason only once in a process."""
    if reason not in _noted:
        _noted.add(reason)
        _logger.warning(reason)
