"""Leaves measurements out by name and reason when they fail, so that the others go on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kvpolicy.errors import KVPolicyError

LeftOut = Callable[[str, str], None]  # what was not measured, and why
NO_TIME = "no time was left"


@contextmanager
def leaving_out(what: str, left_out: LeftOut) -> Iterator[None]:
    """A block whose failure leaves `what` out: an error of ours, or too little memory."""
    try:
        yield
    except (KVPolicyError, torch.OutOfMemoryError) as error:
        left_out(what, str(error).splitlines()[0])
