"""NaN is never kept and never silent."""

import warnings

from kvpolicy.errors import NonFiniteScoreWarning


def warn_of_nan(wrong: int, candidates: int) -> None:
    """Say that some scores are NaN, if any is."""
    if wrong:
        message = f"{wrong} of {candidates} scores are NaN; they rank last"
        warnings.warn(message, NonFiniteScoreWarning, stacklevel=2)
