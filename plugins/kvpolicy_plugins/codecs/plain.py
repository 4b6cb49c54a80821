"""Codec `plain`: packs nothing."""

from typing import ClassVar

import attrs

from kvpolicy.stages import AsIs, Codec, Formats, Site


@attrs.frozen
class Plain(Codec):
    """Keys and values in the model's own dtype. Nothing is computed and nothing is copied."""

    name: ClassVar[str] = "plain"

    def formats(self, site: Site) -> Formats:  # noqa: ARG002 the same for all layers
        return Formats(AsIs(), AsIs())
