"""What a plugin is: import everything that a plugin needs from here."""

from kvpolicy.stages.contracts import (
    STAGES,
    Codec,
    Column,
    Entries,
    HeadAllocator,
    LayerAllocator,
    LayerRequest,
    Merger,
    Needs,
    Plugin,
    Scorer,
    Selector,
    SlotState,
)
from kvpolicy.stages.geometry import Geometry
from kvpolicy.stages.hooks import hookimpl
from kvpolicy.stages.parameters import (
    Choice,
    Flag,
    Integer,
    Nested,
    Number,
    Plugged,
    Rule,
    Text,
    parameter,
)
from kvpolicy.stages.view import View

__all__ = [
    "STAGES",
    "Choice",
    "Codec",
    "Column",
    "Entries",
    "Flag",
    "Geometry",
    "HeadAllocator",
    "Integer",
    "LayerAllocator",
    "LayerRequest",
    "Merger",
    "Needs",
    "Nested",
    "Number",
    "Plugged",
    "Plugin",
    "Rule",
    "Scorer",
    "Selector",
    "SlotState",
    "Text",
    "View",
    "hookimpl",
    "parameter",
]
