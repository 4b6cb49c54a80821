"""The rotary embedding of a model, for codecs that undo it."""

from kvpolicy.errors import ParameterError
from kvpolicy.stages import Rotary


def known(rotary: Rotary | None, needed_by: str) -> Rotary:
    """The rotary embedding. Raises ParameterError, in the name of a codec or a parameter, where it is not known."""
    if rotary is None:
        raise ParameterError(f"{needed_by}: needs the rotary embedding of the model, to undo it: it is not known")
    return rotary
