"""Reader `all`: attends to all held entries."""

from typing import ClassVar

import attrs
from torch import Tensor

from kvpolicy.stages import Reader, ReadRequest


@attrs.frozen
class Everything(Reader):
    """Attention over all that is held."""

    name: ClassVar[str] = "all"

    def choose(self, request: ReadRequest) -> Tensor | None:  # noqa: ARG002 whatever is asked
        return None
