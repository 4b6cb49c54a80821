"""Reader `all`: attends to all entries."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Reader, ReadRequest


@attrs.frozen
class Everything(Reader):
    """Attention over all entries."""

    name: ClassVar[str] = "all"

    def choose(self, request: ReadRequest) -> Tensor | None:  # noqa: ARG002 the same for all requests
        return None
